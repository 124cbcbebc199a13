"""Networks in files: written whole or not at all, and read without executing anything in them.

A module is stored as its state dict, an ExportedProgram as a .pt2 archive. Both come with the plans that made the
network, as JSON.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfact.api import apply
from fxfact.errors import ArgumentTypeError, FileError, FxfactError, error_context, first_differences
from fxfact.factorizations import Factorization
from fxfact.passes import PassRecord, pass_history, set_history
from fxfact.planning import Plan
from fxfact.utils import (
    atomic_write,
    check_harmless,
    check_loadable,
    check_path,
    copy_with_shared,
    explain_refused,
    is_distributed,
    is_wrapper,
    refused_classes,
    reproducible_archive,
    storages_of,
)

_Path = str | os.PathLike[str]
_FactorizationTypes = Sequence[type[Factorization]]

_FORMAT = {"format": "fxfact network", "version": 2}
_HISTORY_FILE = "fxfact.json"  # among the extra files of a .pt2 archive


# Save and load


def save(network: nn.Module | ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Save a network and the plans that made it.

    The file holds tensors and JSON, and nothing that could be executed. If the process is killed meanwhile, ``path``
    has either the old file or the new one.

    Args:
        network: A module, whose state dict is saved, or an ExportedProgram, which is saved as a .pt2 archive that
            ``torch.export.load`` reads as well.
        path: The file to write. ``.pt2`` is for exported programs only.

    Raises:
        ArgumentTypeError: ``network`` is neither a module nor an ExportedProgram, or ``path`` is not a path.
        FileError: The file cannot be written, or the state dict has values that are not tensors.
    """
    check_path(path)
    if isinstance(network, ExportedProgram):
        _save_program(network, path)
    elif isinstance(network, nn.Module):
        if os.fspath(path).endswith(".pt2"):
            raise FileError(f"{path}: .pt2 is for exported programs. Name it .pt, or export the network and save that.")
        _save_state_dict(network, path)
    else:
        raise ArgumentTypeError(f"network must be a torch.nn.Module or ExportedProgram, got {type(network).__name__}")


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    factorizations: Sequence[type[Factorization]] = (),
) -> Any:
    """Load a network that ``save`` wrote.

    Nothing in the file is executed: a file that holds pickled objects other than tensors, or a program that could run
    code of the file, is refused. No kernel is decomposed again.

    Args:
        path: The file to read.
        model: The model that was factorized, for a file that holds a state dict. It is not changed. Its weights do not
            matter and may be on the meta device. Its training mode carries over.
        factorizations: Your own factorization classes, if the saved plans use them.

    Returns:
        ``model`` with the same convolutions factorized and the saved weights, or the saved ExportedProgram.

    Raises:
        ArgumentTypeError: ``path`` is not a path, or ``model`` not a module.
        FileError: The file cannot be read or is damaged, holds code, or holds another model's weights. The message
            names the first differences.
        PlanError: The saved plan does not fit ``model``.
    """
    if "archive_format" in _read_archive_names(path):
        if model is not None:
            raise FileError(f"{path}: an exported program needs no model. Call load(path).")
        return _load_program(path, factorizations)
    if model is None:
        raise FileError(f"{path}: the file holds a state dict. Pass the model that was factorized: load(path, model).")
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return _load_state_dict(path, model, factorizations)


def _read_archive_names(path: _Path) -> list[str]:
    """Check a zip archive, and return the names of its members without the folder that they share."""
    check_path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged, names = archive.testzip(), archive.namelist()
    except FileNotFoundError as error:
        raise FileError(f"{path}: there is no such file") from error
    except Exception as error:  # the reader raises many kinds
        raise FileError(
            f"{path}: no network can be read from this file: {error}. Pass a file that fxfact.save wrote, "
            "and see that all of it is there."
        ) from error
    if damaged is not None:
        raise FileError(f"{path}: the file is damaged: the checksum of {damaged} is wrong. Copy or save it again.")
    return [name.partition("/")[2] for name in names]


# State dicts


def _save_state_dict(network: nn.Module, path: _Path) -> None:
    state = network.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise FileError(
                f"{path}: the state dict's {name} is a {type(value).__name__}, and only tensors can be saved. "
                "Remove get_extra_state from its module."
            )
        if is_distributed(value):
            raise FileError(
                f"{path}: the state dict's {name} is a {type(value).__name__}, which belongs to several processes. "
                "Load the unsharded state (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                "full_state_dict=True) into a copy of the network that is not distributed, and save that."
            )
    tensors = _separate(state)
    check_loadable(path, tensors)
    try:
        with atomic_write(path) as file:
            torch.save({"fxfact": _history_to_text(pass_history(network)), "state": tensors}, file)
    except (OSError, RuntimeError) as error:  # PyTorch raises RuntimeError if the disk is full
        raise FileError(f"{path}: the network cannot be written there: {error}") from error


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the rest of the memory that they are views of. Tensors that are the same stay so."""
    found: dict[tuple[object, ...], Tensor] = {}
    separate = {}
    for name, value in state.items():
        tensor = value.detach()
        if type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_nested:
            key = (*storages_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
            is_whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            plain = tensor.contiguous() if is_whole else tensor.clone(memory_format=torch.contiguous_format)
            tensor = found.setdefault(key, plain)
        separate[name] = tensor
    return separate


def _load_state_dict(path: _Path, model: nn.Module, factorizations: _FactorizationTypes) -> nn.Module:
    """Factorize a copy of the model as the saved plans say, without decomposing, and load the saved tensors into it."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises many kinds
        first_line = str(error).partition("\n")[0]
        reason = explain_refused(refused_classes(path)) or f" {type(error).__name__}: {first_line}"
        raise FileError(
            f"{path}: the file was not loaded, because it is damaged or holds more than tensors.{reason}"
        ) from error
    if not isinstance(data, Mapping) or not isinstance(data.get("state"), Mapping):
        raise FileError(f"{path}: fxfact.save did not write this file. Load a plain state dict by load_state_dict.")
    history = _history_from_text(path, data.get("fxfact"), factorizations)
    network = model if history else copy_with_shared(model, set())
    for record in history:
        network = apply(record.plan, network, weights="empty")
    own_state = network.state_dict(keep_vars=True)
    saved, expected = ({name: _describe(value) for name, value in s.items()} for s in (data["state"], own_state))
    if saved != expected:
        differences = first_differences("the file", saved, "the model", expected)
        raise FileError(f"{path}: the file holds another network. {differences}. Pass the model that was factorized.")
    _put_in(network, own_state, data["state"])
    set_history(network, history)
    return network


def _put_in(network: nn.Module, own_state: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Put the saved tensors into the network: into its own ones, or in their place where values cannot be copied."""
    tensors = [*own_state.values(), *state.values()]
    if not any(tensor.is_meta or tensor.is_nested or is_wrapper(tensor) for tensor in tensors):
        network.load_state_dict(dict(state))
        return
    loaded = _loaded_tensors(state, own_state)
    nested = [name for name, tensor in loaded.items() if tensor.is_nested]  # PyTorch cannot compare their sizes
    rest = {name: tensor for name, tensor in loaded.items() if name not in nested}
    network.load_state_dict(rest, assign=True, strict=not nested)
    for name in nested:
        owner, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(owner), attribute, loaded[name])


def _loaded_tensors(state: Mapping[str, Tensor], own_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the saved tensors as parameters and buffers to assign; parameters that the module shares stay shared.

    They have the device and the strides of the module's tensors, but their own class: a weight that was saved quantized
    is quantized, whether or not the module's is.
    """
    made: dict[int, Tensor] = {}
    for name, old in own_state.items():
        if id(old) not in made:
            new = state[name]
            if type(new) is Tensor and not (old.is_meta or is_wrapper(old) or old.is_nested):
                new = torch.empty_like(old, requires_grad=False).copy_(new)
            elif not old.is_meta:
                new = new.to(old.device)
            made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return {name: made[id(old)] for name, old in own_state.items()}


def _describe(value: Any) -> str:
    """Return dtype and shape of a state dict's value."""
    kind = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
    shape = "nested" if getattr(value, "is_nested", False) else tuple(getattr(value, "shape", ()))
    return f"{kind} {shape}"


# Programs


def _save_program(program: ExportedProgram, path: _Path) -> None:
    constants = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    check_loadable(path, {**program.state_dict, **constants})
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={_HISTORY_FILE: _history_to_text(pass_history(program))})
    archive = reproducible_archive(buffer)
    try:
        with atomic_write(path) as file:
            file.write(archive)
    except OSError as error:
        raise FileError(f"{path}: the program cannot be written there: {error}") from error


def _load_program(path: _Path, factorizations: _FactorizationTypes) -> ExportedProgram:
    check_harmless(path)
    extra_files, errors = {_HISTORY_FILE: ""}, _ReaderErrors()
    reader_log = logging.getLogger("torch.export")
    reader_log.addFilter(errors)
    try:
        program = torch.export.load(path, extra_files=extra_files)
    except Exception as error:  # the reader raises many kinds
        raise FileError(f"{path}: PyTorch cannot read this program: {errors.explain(error)}") from error
    finally:
        reader_log.removeFilter(errors)
    if extra_files[_HISTORY_FILE]:
        set_history(program.graph_module, _history_from_text(path, extra_files[_HISTORY_FILE], factorizations))
    return program


class _ReaderErrors(logging.Filter):
    """Collects the errors that PyTorch's reader logs with tracebacks, instead of printing them."""

    def __init__(self) -> None:
        super().__init__()
        self._messages: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the record's message, and drop the record."""
        self._messages.append(str(record.exc_info[1]) if record.exc_info else record.getMessage())
        return False

    def explain(self, error: Exception) -> str:
        """Say why the reader failed, and the way out if it is known."""
        text = " ".join([*self._messages, str(error)])
        if unknown := re.search(r"Deserializing (\S+) in pytree is not registered", text):
            package = unknown[1].rpartition(".")[0]
            return (
                f"its inputs or outputs have the type {unknown[1]}, which is unknown until its package is imported. "
                f"Import {package} first (fxfact … --import {package}), or export a module that returns tensors."
            )
        return f"{type(error).__name__}: {self._messages[-1] if self._messages else error}"


# History


def _history_to_text(history: Sequence[PassRecord]) -> str:
    """Return the plans that were applied, oldest first, with the errors of their kernels, as JSON."""
    records = [
        {
            "plan": record.plan.to_json(),
            "relative_error": dict(record.relative_error),
            "weight_digest": dict(record.weight_digest),
        }
        for record in history
    ]
    return json.dumps({**_FORMAT, "history": records})


def _history_from_text(path: _Path, text: object, factorizations: _FactorizationTypes) -> tuple[PassRecord, ...]:
    """Read what ``_history_to_text`` wrote. Raises FileError."""
    try:
        data: Any = json.loads(text) if isinstance(text, str | bytes) else None
        if not isinstance(data, Mapping) or {key: data.get(key) for key in _FORMAT} != _FORMAT:
            raise FileError(f"expected {_FORMAT}, found {str(data)[:80]}")
        return tuple(
            PassRecord(
                Plan.from_json(record["plan"], factorizations=factorizations),
                _parse_relative_errors(record["relative_error"]),
                _parse_weight_digests(record["weight_digest"]),
            )
            for record in data["history"]
        )
    except (ValueError, KeyError, TypeError, RecursionError, FxfactError) as error:
        reason = str(error).removesuffix(".")
        raise FileError(
            f"{path}: the plans that made the network cannot be read: {reason}. Factorize the model again."
        ) from error


def _parse_relative_errors(values: Any) -> dict[str, float | None]:
    with error_context("relative_error"):
        if not isinstance(values, Mapping) or not all(v is None or isinstance(v, int | float) for v in values.values()):
            raise FileError(f"expected numbers by path, found {str(values)[:80]}")
    return {str(path): None if value is None else float(value) for path, value in values.items()}


def _parse_weight_digests(values: Any) -> dict[str, str]:
    if not isinstance(values, Mapping) or not all(isinstance(value, str) for value in values.values()):
        raise FileError(f"weight_digest: expected strings by path, found {str(values)[:80]}")
    return {str(path): value for path, value in values.items()}
