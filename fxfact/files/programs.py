"""An exported program in a file: PyTorch's own archive, .pt2, with what was done to it beside."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import sympy
import torch
import torch.utils._sympy.functions as sympy_functions
from sympy.logic.boolalg import Boolean
from torch.export import ExportedProgram

from fxfact.errors import FileError
from fxfact.files.base import Kinds, history_from_text, history_to_text
from fxfact.passes import applied, record_all
from fxfact.writing import written

_EXTRA = "fxfact.json"
_PARTS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/[a-z_]+|models/[^/]+\.json|extra/.+|data/sample_inputs/[^/]+\.pt|"
    r"data/(weights|constants)/(weight_\d+|tensor_\d+|[^/]+_config\.json)"
)
_SYMBOL = r"'[a-z]+\d+'"  # within quotes, the only strings
_TOKENS = re.compile(_SYMBOL + r"|[a-z]+=(?:True|False)|(?P<name>[A-Za-z]\w*)|\d+(?:\.\d+)?|[\s()+*/%,<>=&|~-]")


def save_program(program: ExportedProgram, path: str | os.PathLike[str]) -> None:
    """See ``save``."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={_EXTRA: history_to_text(applied(program))})
    try:
        with written(path) as file:
            file.write(buffer.getbuffer())
    except OSError as error:
        raise FileError(f"{path}: the program cannot be written there: {error}") from error


def load_program(path: str | os.PathLike[str], kinds: Kinds) -> ExportedProgram:
    """See ``load``."""
    _check_harmless(path)
    extra, reasons = {_EXTRA: ""}, _Reasons()
    reader = logging.getLogger("torch.export")
    reader.addFilter(reasons)
    try:
        program = torch.export.load(path, extra_files=extra)
    except Exception as error:  # whatever the reader finds
        raise FileError(f"{path}: PyTorch cannot read this program: {reasons.of(error)}") from error
    finally:
        reader.removeFilter(reasons)
    if extra[_EXTRA]:
        record_all(program.graph_module, history_from_text(path, extra[_EXTRA], kinds))
    return program


class _Reasons(logging.Filter):
    """Keeps what PyTorch's reader logs as its reasons, tracebacks and all, instead of printing it."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Take every record."""
        self._found.append(str(record.exc_info[1]) if record.exc_info else record.getMessage())
        return False

    def of(self, error: Exception) -> str:
        """Why it failed, and the way out where there is one."""
        text = " ".join([*self._found, str(error)])
        if unknown := re.search(r"Deserializing (\S+) in pytree is not registered", text):
            package = unknown[1].rpartition(".")[0]
            return (
                f"it takes or returns a {unknown[1]}, which is known only once its package is imported. Import "
                f"{package} first (fxfact … --import {package}), or export a module that returns tensors."
            )
        return f"{type(error).__name__}: {self._found[-1] if self._found else error}"


def _check_harmless(path: str | os.PathLike[str]) -> None:
    """Raise FileError where reading the archive could execute something of it.

    PyTorch's reader falls back to full pickles for sample inputs, loads compiled libraries and script objects, and
    evaluates the expressions of symbolic sizes.
    """
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            part = name.partition("/")[2]
            if not _PARTS.fullmatch(part):
                raise FileError(f"{path}: it holds {part}, which is no part of a plain exported program: not read")
            if part.startswith("data/sample_inputs/"):
                try:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
                except Exception as error:
                    raise FileError(f"{path}: {part} holds more than tensors: not read") from error
            if part.startswith("models/"):
                try:
                    expressions = list(_expressions(json.loads(archive.read(name))))
                except (ValueError, RecursionError) as error:
                    raise FileError(f"{path}: {part} is damaged: {error}") from error
                for expression in expressions:
                    if not _is_arithmetic(expression):
                        raise FileError(f"{path}: {expression[:80]!r} in {part} is no size: not read")


def _expressions(data: Any) -> Iterator[str]:
    """Of symbolic sizes, wherever they stand."""
    if isinstance(data, dict):
        for key, value in data.items():
            if key == "expr_str":
                yield str(value)
            else:
                yield from _expressions(value)
    elif isinstance(data, list):
        for value in data:
            yield from _expressions(value)


def _is_arithmetic(expression: str) -> bool:
    """Whether it is made of symbols, numbers, operators, and SymPy's and PyTorch's functions of these."""
    tokens = list(_TOKENS.finditer(expression))
    names = [token["name"] for token in tokens if token["name"]]
    known = [getattr(sympy, name, None) or getattr(sympy_functions, name, None) for name in names]
    return all(isinstance(one, type | Boolean) for one in known) and "".join(token[0] for token in tokens) == expression
