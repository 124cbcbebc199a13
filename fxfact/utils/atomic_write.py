"""Writes files completely or not at all, and JSON without NaN."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from fxfact.errors import ArgumentError, ArgumentTypeError, FileError


def check_path(path: object) -> None:
    """Raise ArgumentTypeError if ``path`` is not a path."""
    if not isinstance(path, str | os.PathLike):
        raise ArgumentTypeError(f"path must be a str or os.PathLike, got {type(path).__name__}")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that replaces ``path`` when the block ends without an error.

    The file is replaced in one step: if the process is killed, either the old or the new file is there. If ``path`` is
    a link, the file that it links to is replaced. Devices and pipes are written directly. Raises OSError.
    """
    kind = os.stat(path).st_mode if os.path.exists(path) else stat.S_IFREG
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(f"{path} is a folder")
    if not stat.S_ISREG(kind):  # opened by its own name, since the target of a link like /dev/stdout may have no path
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
        os.chmod(name, _permissions(target))
        os.replace(name, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def write_by_suffix(path: str | os.PathLike[str], kind: str, texts: Mapping[str, Callable[[], str]]) -> None:
    """Write one of several texts to a file, chosen by the suffix of its name.

    ``kind`` is how messages call what is written, and ``texts`` has a function for each suffix. Raises ArgumentError
    for another suffix, ArgumentTypeError if ``path`` is not a path, and FileError if the file cannot be written.
    """
    check_path(path)
    name = os.fspath(path)
    suffix = next((suffix for suffix in texts if name.endswith(suffix)), None)
    if suffix is None:
        names = " or ".join(f"NAME{suffix}" for suffix in texts)
        raise ArgumentError(f"a {kind} is written to {names}, got {name}")
    text = texts[suffix]()
    try:
        with atomic_write(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise FileError(f"{name}: the {kind} cannot be written there: {error}") from error


def as_json(data: Any, *, indent: int | None = None) -> str:
    """Return ``data`` as JSON. NaN and infinity become null, since JSON does not have them."""
    finite = json.loads(json.dumps(data), parse_constant=lambda _: None)
    return json.dumps(finite, indent=indent)


def _permissions(target: Path) -> int:
    """Return the permissions of the file that is replaced, or those of a new file."""
    if target.exists():
        return target.stat().st_mode & 0o7777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
