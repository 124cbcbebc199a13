"""Checks that a .pt2 archive holds no code that PyTorch would execute when it reads or runs the program.

Everything is forbidden that is not known to be harmless: archive members, expressions of sizes, operators, guards and
names.
"""

from __future__ import annotations

import io
import json
import math
import operator
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import sympy
import torch
import torch.utils._sympy.functions as sympy_functions
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.nn import Parameter

from fxfact.errors import FileError

_SHOWN = 5  # classes that a message names
_PAYLOAD_CONFIG = re.compile(r"data/(weights|constants)/[^/]+_config\.json")
_MEMBER = re.compile(
    r"archive_format|archive_version|byteorder|\.data/[a-z_]+|models/[^/]+\.json|extra/.+|data/sample_inputs/[^/]+\.pt|"
    rf"data/(weights|constants)/(weight_\d+|tensor_\d+)|{_PAYLOAD_CONFIG.pattern}"
)
_SYMBOL = r"'[a-z]+\d+'"  # the only strings in an expression
_EXPRESSION_TOKEN = re.compile(
    _SYMBOL + r"|[a-z]+=(?:True|False)|(?P<name>[A-Za-z]\w*)|\d+(?:\.\d+)?|[\s()+*/%,<>=&|~-]"
)
_GUARD = re.compile(
    r"(?:\bL(?:\['\w+'\]|\[\d+\])+|\.(?:size|stride|storage_offset)\(\)|\[\d+\]|\bmath\.[a-z]+\b|\b(?:and|or|not|min|max)\b"
    r"|[\d.]+|[\s()+*/%,<>=!-])*"
)
_SCALAR_FUNCTION = re.compile(r"(?:_operator|math)\.[a-z]\w*|torch\.sym_\w+|torch\._functorch\.predispatch\.\w+")
_MODULE_OF_PREFIX = {"_operator": operator, "torch": torch, "math": math}  # as PyTorch's reader resolves a target
_CALLS_ITS_ARGUMENT = ("call", "methodcaller", "attrgetter")  # functions of _operator that are not scalar functions


def check_harmless(path: str | os.PathLike[str]) -> None:
    """Raise FileError if reading this archive, or running the program that it holds, could execute code of the file.

    PyTorch's reader unpickles sample inputs, and weights that are marked as pickled. It loads compiled libraries and
    script objects, evaluates the expressions of symbolic sizes, calls any function of ``torch`` that a node names, and
    writes names into the code of the graph.
    """
    with zipfile.ZipFile(path) as archive:
        members = {name: name.partition("/")[2] for name in archive.namelist()}  # without the folder that all share
        if len(members) != len(archive.namelist()):
            raise FileError(f"{path}: a member of the archive is there twice. The file was not read.")
        for name, member in members.items():
            if not _MEMBER.fullmatch(member):
                raise FileError(
                    f"{path}: the archive holds {member}, which is not part of a plain exported program. "
                    "The file was not read."
                )
            if member.startswith("data/sample_inputs/") and (data := archive.read(name)):  # empty without inputs
                _check_only_tensors(path, member, data)
            if member.startswith("models/"):
                for expected, text in _find_unsafe(_parse_json(path, member, archive.read(name))):
                    raise FileError(f"{path}: {text[:80]!r} in {member} is not {expected}. The file was not read.")
            if _PAYLOAD_CONFIG.fullmatch(member):
                for payload in _pickled_payloads(_parse_json(path, member, archive.read(name))):
                    payload_name = f"{name.rpartition('/')[0]}/{payload}"
                    data = archive.read(payload_name) if payload_name in members else b""
                    _check_only_tensors(path, payload_name, data)


def refused_classes(file: str | os.PathLike[str] | BinaryIO) -> list[str]:
    """Return the classes and functions in a file of torch.save that ``torch.load(weights_only=True)`` refuses."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # the file is damaged
        return []


def explain_refused(names: Sequence[str]) -> str:
    """Say which classes these are and how to register them, or return "" if some are known to be no tensor classes."""
    if not names or not all(map(_may_be_tensor_class, names)):
        return ""
    return (
        f" It holds {', '.join(names[:_SHOWN])}. If these are tensor classes that you trust, import their package, "
        "which registers them (torchao does), or call torch.serialization.add_safe_globals."
    )


def _may_be_tensor_class(name: str) -> bool:
    """Whether a name is of a tensor class, or of a module that is not imported."""
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    return module not in sys.modules or (isinstance(found, type) and issubclass(found, Tensor))


def check_loadable(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Raise FileError if tensors are of classes that cannot be pickled, or that no load would accept."""
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, Parameter):
            buffer = io.BytesIO()
            try:
                torch.save(tensor, buffer)
            except Exception as error:
                raise FileError(f"{path}: {name}, a {type(tensor).__name__}, cannot be pickled: {error}") from error
            buffer.seek(0)
            if names := refused_classes(buffer):
                raise FileError(
                    f"{path}: {name} is a {type(tensor).__name__}, which could not be loaded again, because loading "
                    f"executes nothing that is not registered as safe. Before you save, and before you load, call "
                    f"torch.serialization.add_safe_globals for {', '.join(names[:_SHOWN])}."
                )


def _check_only_tensors(path: str | os.PathLike[str], member: str, data: bytes) -> None:
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        advice = explain_refused(refused_classes(io.BytesIO(data)))
        raise FileError(f"{path}: {member} holds more than tensors. The file was not read.{advice}") from error


def _parse_json(path: str | os.PathLike[str], member: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: {member} is damaged: {error}") from error


def _pickled_payloads(config: Any) -> Iterator[str]:
    """Yield the names of the payloads that the reader would unpickle."""
    if isinstance(config, dict):
        if config.get("use_pickle"):
            yield str(config.get("path_name"))
        for value in config.values():
            yield from _pickled_payloads(value)


def _find_unsafe(model: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text of the model that becomes code and fails its check, after what was expected there."""
    if key in _CHECKS and not isinstance(model, list):
        expected, is_safe = _CHECKS[key]
        if not is_safe(str(model)):
            yield expected, str(model)
    elif isinstance(model, dict):
        for name, value in model.items():
            yield from _find_unsafe(value, name)
    elif isinstance(model, list):
        for value in model:
            yield from _find_unsafe(value, key)


def _is_arithmetic(expression: str) -> bool:
    """Whether an expression has only symbols, numbers, operators and functions of SymPy or of PyTorch's extension."""
    tokens = list(_EXPRESSION_TOKEN.finditer(expression))
    names = [token["name"] for token in tokens if token["name"]]
    known = [getattr(sympy, name, None) or getattr(sympy_functions, name, None) for name in names]
    return all(isinstance(one, type | Boolean) for one in known) and "".join(token[0] for token in tokens) == expression


def _is_operator(target: str) -> bool:
    """Whether PyTorch's reader resolves a node's target to an operator, or to nothing."""
    found: Any = next((module for prefix, module in _MODULE_OF_PREFIX.items() if target.startswith(prefix)), None)
    names = target.split(".")[1:]
    for name in names:
        if not hasattr(found, name):
            return True
        found = getattr(found, name)
    is_scalar_function = _SCALAR_FUNCTION.fullmatch(target) is not None and names[-1] not in _CALLS_ITS_ARGUMENT
    return found is None or is_scalar_function or isinstance(found, OpOverload | HigherOrderOperator)


def _is_guard(text: str) -> bool:
    """Whether a guard only compares sizes, strides and numbers."""
    return _GUARD.fullmatch(text) is not None


def _is_identifier(text: str) -> bool:
    return text == "" or text.isidentifier()


def _is_attribute_path(text: str) -> bool:
    return not any(character in text for character in '"\\\n\r')


def _has_safe_keywords(in_spec: str) -> bool:
    """Whether the keyword arguments in a serialized input structure have identifiers as names."""
    if in_spec == str(None):
        return True
    try:
        _, *keywords = json.loads(in_spec)[1]["children_spec"] or [None]
        keys = [json.loads(each["context"]) for each in keywords[:1] if each["type"] == "builtins.dict"]
    except (ValueError, TypeError, KeyError, IndexError):
        return False
    return all(isinstance(name, str) and _is_identifier(name) for names in keys for name in names)


_CHECKS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "expr_str": ("a size", _is_arithmetic),
    "name": ("a name", _is_identifier),
    "as_name": ("a name", _is_identifier),
    "forward_arg_names": ("a name", _is_identifier),
    "in_spec": ("a list of arguments", _has_safe_keywords),
    "parameter_name": ("a path", _is_attribute_path),
    "buffer_name": ("a path", _is_attribute_path),
    "tensor_constant_name": ("a path", _is_attribute_path),
    "target": ("an operator", _is_operator),
    "as_operator": ("an operator", _is_operator),
    "guards_code": ("a guard", _is_guard),
}
"""The texts of a serialized model that become code, by key: what belongs there, and how to tell."""
