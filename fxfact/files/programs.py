"""An exported program in a file: PyTorch's own archive, .pt2, with what was done to it beside."""

from __future__ import annotations

import io
import logging
import os
import re

import torch
from torch.export import ExportedProgram

from fxfact.errors import FileError
from fxfact.files.base import Kinds, history_from_text, history_to_text
from fxfact.files.harmless import check_harmless
from fxfact.passes import applied, record_all
from fxfact.writing import written

_EXTRA = "fxfact.json"


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
    check_harmless(path)
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
