"""What was done to a network, as text that goes into its file."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfact.api import apply
from fxfact.errors import ArgumentTypeError, FileError, FxfactError, error_context, first_differences
from fxfact.factorizations import Factorization
from fxfact.passes import PassRecord, pass_history, set_history
from fxfact.planning import Plan
from fxfact.utils import atomic_write, check_harmless, check_path, copy_with_shared

_FORMAT = {"format": "fxfact network", "version": 1}
Kinds = Sequence[type[Factorization]]


def history_to_text(history: Sequence[PassRecord]) -> str:
    """JSON of every plan carried out, oldest first, with the errors of its kernels."""
    done = [{"plan": one.plan.to_json(), "relative_error": dict(one.relative_error)} for one in history]
    return json.dumps({**_FORMAT, "history": done})


def history_from_text(path: str | os.PathLike[str], text: object, kinds: Kinds) -> tuple[PassRecord, ...]:
    """The inverse. Raises FileError."""
    try:
        data: Any = json.loads(text) if isinstance(text, str | bytes) else None
        if not isinstance(data, Mapping) or {key: data.get(key) for key in _FORMAT} != _FORMAT:
            raise FileError(f"expected {_FORMAT}, found {str(data)[:80]}")
        return tuple(
            PassRecord(Plan.from_json(one["plan"], factorizations=kinds), _errors(one["relative_error"]))
            for one in data["history"]
        )
    except (ValueError, KeyError, TypeError, RecursionError, FxfactError) as error:
        raise FileError(f"{path}: it does not say what was done to the network: {error}. Save it again.") from error


def names_in(path: str | os.PathLike[str]) -> list[str]:
    """What a zip archive holds, each name without the folder that all are in. Raises FileError for other files,
    ArgumentTypeError.
    """
    check_path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged, names = archive.testzip(), archive.namelist()
    except FileNotFoundError as error:
        raise FileError(f"{path}: there is no such file") from error
    except Exception as error:  # whatever the reader finds
        raise FileError(f"{path}: this is no network that can be read, or not all of it: {error}") from error
    if damaged is not None:
        raise FileError(f"{path}: the file is damaged: {damaged} is not what was written")
    return [name.partition("/")[2] for name in names]


def _errors(values: Any) -> dict[str, float | None]:
    with error_context("relative_error"):
        if not isinstance(values, Mapping) or not all(v is None or isinstance(v, int | float) for v in values.values()):
            raise FileError(f"expected numbers by path, found {str(values)[:80]}")
    return {str(path): None if value is None else float(value) for path, value in values.items()}


_Module = TypeVar("_Module", bound=nn.Module)


def save_state(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """See ``save``."""
    state = network.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise FileError(f"{path}: {name} of the state is a {type(value).__name__}; only tensors can be saved")
    plain = {name: value.detach().contiguous() for name, value in state.items()}
    try:
        with atomic_write(path) as file:
            torch.save({"fxfact": history_to_text(pass_history(network)), "state": plain}, file)
    except (OSError, RuntimeError) as error:  # PyTorch's writer makes the one of a full disk the other
        raise FileError(f"{path}: the network cannot be written there: {error}") from error


def load_state(path: str | os.PathLike[str], model: _Module, kinds: Kinds) -> _Module:
    """See ``load``."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader finds
        raise FileError(
            f"{path}: the file is damaged, or holds more than tensors, and is not read: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    if not isinstance(data, Mapping) or not isinstance(data.get("state"), Mapping):
        raise FileError(f"{path}: no network of fxfact.save's. (A plain state_dict goes into net.load_state_dict.)")
    history = history_from_text(path, data.get("fxfact"), kinds)
    network: nn.Module = model if history else copy_with_shared(model, set())
    for done in history:
        network = apply(done.plan, network, weights="empty")
    own = network.state_dict(keep_vars=True)
    theirs, ours = ({name: _shape(value) for name, value in each.items()} for each in (data["state"], own))
    if theirs != ours:
        different = first_differences("the file", theirs, "the model", ours)
        raise FileError(f"{path}: the file is of another network. {different}. Pass the model it was.")
    if any(tensor.is_meta for tensor in own.values()):
        network.load_state_dict(_taking_place(data["state"], own), assign=True)
    else:
        network.load_state_dict(dict(data["state"]))
    set_history(network, history)
    return cast(_Module, network)


def _taking_place(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in tensors that can replace a module's own, one where those are one."""
    made: dict[int, Tensor] = {}
    for name, old in own.items():
        new = nn.Parameter(state[name], old.requires_grad) if isinstance(old, nn.Parameter) else state[name]
        made.setdefault(id(old), new)
    return {name: made[id(old)] for name, old in own.items()}


def _shape(value: Any) -> str:
    kind = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
    return f"{kind} {tuple(getattr(value, 'shape', ()))}"


_EXTRA = "fxfact.json"


def save_program(program: ExportedProgram, path: str | os.PathLike[str]) -> None:
    """See ``save``."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={_EXTRA: history_to_text(pass_history(program))})
    try:
        with atomic_write(path) as file:
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
        set_history(program.graph_module, history_from_text(path, extra[_EXTRA], kinds))
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
