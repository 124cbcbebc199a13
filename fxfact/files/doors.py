"""Into files and out of them."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from fxfact.errors import ArgumentTypeError, FileError
from fxfact.files.base import Kinds, names_in
from fxfact.files.programs import load_program, save_program
from fxfact.files.states import load_state, save_state
from fxfact.writing import check_path


def save(network: nn.Module | ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Write a network and the plans that made it: tensors and JSON, nothing that could be executed.

    A module is written as its state, for ``load`` to put into the user's own model; an ExportedProgram as PyTorch's own
    .pt2 archive, which ``torch.export.load`` reads as well. At ``path`` there is the old file or the new one, whenever
    the process is killed. Raises ArgumentTypeError, FileError.
    """
    check_path(path)
    if isinstance(network, ExportedProgram):
        save_program(network, path)
    elif isinstance(network, nn.Module):
        if os.fspath(path).endswith(".pt2"):
            raise FileError(f"{path}: .pt2 is for exported programs. Name it .pt, or export the network and save that.")
        save_state(network, path)
    else:
        raise ArgumentTypeError(f"network must be a torch.nn.Module or ExportedProgram, got {type(network).__name__}")


def load(path: str | os.PathLike[str], model: nn.Module | None = None, *, factorizations: Kinds = ()) -> Any:
    """What ``save`` wrote: ``model``, the network that it was made of, with the same convolutions factorized and the
    same weights, nothing decomposed again; or the ExportedProgram, without a model.

    ``model`` is not changed. Its own weights do not matter, and may be on the meta device; its training mode does.
    ``factorizations`` are classes of your own that the plans name. Nothing in the file is executed: pickles of anything
    but tensors are refused. Raises FileError, which names the first differences where the file is of another model,
    PlanError.
    """
    if "archive_format" in names_in(path):
        if model is not None:
            raise FileError(f"{path}: an exported program needs no model. Call load(path).")
        return load_program(path, factorizations)
    if model is None:
        raise FileError(f"{path}: the file holds weights. Pass the model that they are of: load(path, model).")
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return load_state(path, model, factorizations)
