"""What of an exported program's archive PyTorch would execute when it is read, or run: only what belongs there may."""

from __future__ import annotations

import io
import json
import math
import operator
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
import torch.utils._sympy.functions as sympy_functions
from sympy.logic.boolalg import Boolean
from torch._ops import HigherOrderOperator, OpOverload

from fxfact.errors import FileError

_PAYLOADS = re.compile(r"data/(weights|constants)/[^/]+_config\.json")
_PARTS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/[a-z_]+|models/[^/]+\.json|extra/.+|data/sample_inputs/[^/]+\.pt|"
    rf"data/(weights|constants)/(weight_\d+|tensor_\d+)|{_PAYLOADS.pattern}"
)
_SYMBOL = r"'[a-z]+\d+'"  # within quotes, the only strings
_TOKENS = re.compile(_SYMBOL + r"|[a-z]+=(?:True|False)|(?P<name>[A-Za-z]\w*)|\d+(?:\.\d+)?|[\s()+*/%,<>=&|~-]")
_GUARD = re.compile(
    r"(?:\bL(?:\['\w+'\]|\[\d+\])+|\.(?:size|stride|storage_offset)\(\)|\[\d+\]|\bmath\.[a-z]+\b|\b(?:and|or|not|min|max)\b"
    r"|[\d.]+|[\s()+*/%,<>=!-])*"
)
_FUNCTION = re.compile(r"(?:_operator|math)\.[a-z]\w*|torch\.sym_\w+|torch\._functorch\.predispatch\.\w+")
_OWNERS = {"_operator": operator, "torch": torch, "math": math}  # by how a name begins
_CALLING = ("call", "methodcaller", "attrgetter")  # of the operators on numbers, those that are of functions


def check_harmless(path: str | os.PathLike[str]) -> None:
    """Raise FileError where reading the archive, or running what is read, could execute something of it.

    PyTorch's reader takes full pickles for sample inputs and for weights that are said to be such, loads compiled
    libraries and script objects, evaluates the expressions of symbolic sizes, calls whatever function of ``torch`` a
    node names, and writes names into the code of the graph.
    """
    with zipfile.ZipFile(path) as archive:
        names = {name: name.partition("/")[2] for name in archive.namelist()}
        if len(names) != len(archive.namelist()):
            raise FileError(f"{path}: it holds a part twice: not read")
        for name, part in names.items():
            if not _PARTS.fullmatch(part):
                raise FileError(f"{path}: it holds {part}, which is no part of a plain exported program: not read")
            if part.startswith("data/sample_inputs/"):
                _check_tensors(path, part, archive.read(name))
            if part.startswith("models/"):
                for what, text in _unfit(_read(path, part, archive.read(name))):
                    raise FileError(f"{path}: {text[:80]!r} in {part} is no {what}: not read")
            if _PAYLOADS.fullmatch(part):
                for pickled in _pickled(_read(path, part, archive.read(name))):
                    inside = f"{name.rpartition('/')[0]}/{pickled}"
                    _check_tensors(path, inside, archive.read(inside) if inside in names else b"")


def _check_tensors(path: str | os.PathLike[str], part: str, data: bytes) -> None:
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        raise FileError(f"{path}: {part} holds more than tensors: not read") from error


def _read(path: str | os.PathLike[str], part: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: {part} is damaged: {error}") from error


def _pickled(data: Any) -> Iterator[str]:
    """The names of the payloads that the reader would unpickle."""
    if isinstance(data, dict):
        if data.get("use_pickle"):
            yield str(data.get("path_name"))
        for value in data.values():
            yield from _pickled(value)


def _unfit(data: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """What stands where code is made of it and is not what belongs there, and what that would be."""
    if key in _KINDS and not isinstance(data, list):
        what, fits = _KINDS[key]
        if not fits(str(data)):
            yield what, str(data)
    elif isinstance(data, dict):
        for name, value in data.items():
            yield from _unfit(value, name)
    elif isinstance(data, list):
        for value in data:
            yield from _unfit(value, key)


def _is_arithmetic(expression: str) -> bool:
    """Whether it is made of symbols, numbers, operators, and SymPy's and PyTorch's functions of these."""
    tokens = list(_TOKENS.finditer(expression))
    names = [token["name"] for token in tokens if token["name"]]
    known = [getattr(sympy, name, None) or getattr(sympy_functions, name, None) for name in names]
    return all(isinstance(one, type | Boolean) for one in known) and "".join(token[0] for token in tokens) == expression


def _is_operator(target: str) -> bool:
    """Whether PyTorch's reader makes one of PyTorch's operators of it, or finds nothing."""
    found: Any = next((owner for begin, owner in _OWNERS.items() if target.startswith(begin)), None)
    names = target.split(".")[1:]
    for name in names:
        if not hasattr(found, name):
            return True
        found = getattr(found, name)
    known = _FUNCTION.fullmatch(target) is not None and names[-1] not in _CALLING
    return found is None or known or isinstance(found, OpOverload | HigherOrderOperator)


def _is_name(text: str) -> bool:
    return text == "" or text.isidentifier()


def _is_path(text: str) -> bool:
    return not any(character in text for character in '"\\\n\r')


def _has_named_arguments(spec: str) -> bool:
    """Whether, of how arguments are nested, the names of those that are passed by name are names."""
    if spec == str(None):
        return True
    try:
        _, *by_name = json.loads(spec)[1]["children_spec"] or [None]
        keys = [json.loads(each["context"]) for each in by_name[:1] if each["type"] == "builtins.dict"]
    except (ValueError, TypeError, KeyError, IndexError):
        return False
    return all(isinstance(name, str) and _is_name(name) for names in keys for name in names)


_KINDS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "expr_str": ("size", _is_arithmetic),
    "name": ("name", _is_name),
    "as_name": ("name", _is_name),
    "forward_arg_names": ("name", _is_name),
    "in_spec": ("list of arguments", _has_named_arguments),
    "parameter_name": ("path", _is_path),
    "buffer_name": ("path", _is_path),
    "tensor_constant_name": ("path", _is_path),
    "target": ("operator", _is_operator),
    "as_operator": ("operator", _is_operator),
    "guards_code": ("guard", lambda text: _GUARD.fullmatch(text) is not None),
}
