"""Rewrites .pt2 archives without what differs between two equal runs: addresses, counters and folders."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from torch.export.pt2_archive import PT2ArchiveWriter

_MODEL = re.compile(r"models/[^/]+\.json")
_WRITTEN_BY_PYTORCH = (".data/version", ".data/serialization_id", "byteorder")
_FILE_NAME = re.compile(r'(?<=File ")[^"\n]+(?=", line )')
_COUNTED_NAME = re.compile(r"(<eval_with_key>)\.\d+")


def reproducible_archive(archive: BinaryIO) -> memoryview:
    """Return the bytes of an archive that ``torch.export.save`` wrote, changed so that equal programs give equal bytes.

    The numbers of graphs in ``from_node`` are addresses, and become 0, 1, ... in the order of the file. The files in
    stack traces get the path within their package.
    """
    copied = io.BytesIO()  # PyTorch's writer ends the process if a disk is full
    with zipfile.ZipFile(archive) as source:
        writer = PT2ArchiveWriter(copied)
        for name in source.namelist():
            member = name.partition("/")[2]  # without the folder that all share
            if member not in _WRITTEN_BY_PYTORCH:
                data = source.read(name)
                writer.write_bytes(member, _reproducible_model(data) if _MODEL.fullmatch(member) else data)
        writer.close()
    return copied.getbuffer()


def _reproducible_model(data: bytes) -> bytes:
    numbers: dict[int, int] = {}
    replace: dict[str, Callable[[str], str]] = {
        "stack_trace": _without_folders,
        "from_node": partial(_numbered, numbers),
    }
    return json.dumps(_replaced(json.loads(data), replace)).encode()


def _replaced(value: Any, replace: dict[str, Callable[[str], str]]) -> Any:
    """Return JSON data with the texts under some keys replaced."""
    if isinstance(value, dict):
        return {
            key: replace[key](item) if key in replace and isinstance(item, str) else _replaced(item, replace)
            for key, item in value.items()
        }
    return [_replaced(item, replace) for item in value] if isinstance(value, list) else value


def _numbered(numbers: dict[int, int], from_node: str) -> str:
    """Return the history of a node with small numbers in place of the addresses of graphs."""

    def renumber(fields: dict[str, Any]) -> dict[str, Any]:
        if "graph_id" in fields:
            fields["graph_id"] = numbers.setdefault(fields["graph_id"], len(numbers))
        return fields

    return json.dumps(json.loads(from_node, object_hook=renumber))


def _without_folders(stack_trace: str) -> str:
    return _COUNTED_NAME.sub(r"\1", _FILE_NAME.sub(lambda found: _path_in_package(found[0]), stack_trace))


def _path_in_package(file: str) -> str:
    """Return the path of a source file from its outermost package on, such as torch/nn/modules/conv.py."""
    path = Path(file)
    if not path.is_absolute():
        return file
    folder = path.parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return path.relative_to(folder).as_posix()
