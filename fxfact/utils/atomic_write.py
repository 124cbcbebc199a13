"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from fxfact.errors import ArgumentTypeError


def check_path(path: object) -> None:
    """Raise ArgumentTypeError for what is no path."""
    if not isinstance(path, str | os.PathLike):
        raise ArgumentTypeError(f"path must be a str or os.PathLike, got {type(path).__name__}")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of ``path``, or of what it links to, when the block ends: all at once,
    and only if nothing was raised. Whenever the process is killed, there is the old file or the new one. A device or a
    pipe is written to. Raises OSError.
    """
    kind = os.stat(path).st_mode if os.path.exists(path) else stat.S_IFREG
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(f"{path} is a folder")
    if not stat.S_ISREG(kind):  # by its own name: what that links to may have none
        with open(path, "wb") as device:
            yield device
        return
    target = Path(os.path.realpath(path))
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, _mode(target))
        os.replace(name, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def as_json(data: Any, *, indent: int | None = None) -> str:
    """JSON, which has no NaN and no infinity: they become null."""
    finite = json.loads(json.dumps(data), parse_constant=lambda _: None)
    return json.dumps(finite, indent=indent)


def _mode(target: Path) -> int:
    """Of the file that is replaced, else what a new one gets."""
    if target.exists():
        return target.stat().st_mode & 0o7777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
