"""A factorized module in a file: what was done, and its state, for the user's own model to be loaded into."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fxfact.api import apply
from fxfact.copying import copy_sharing
from fxfact.errors import FileError, first_differences
from fxfact.files.base import Kinds, history_from_text, history_to_text
from fxfact.passes import applied, record_all
from fxfact.writing import written

_Module = TypeVar("_Module", bound=nn.Module)


def save_state(network: nn.Module, path: str | os.PathLike[str]) -> None:
    """See ``save``."""
    state = network.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise FileError(f"{path}: {name} of the state is a {type(value).__name__}; only tensors can be saved")
    plain = {name: value.detach().contiguous() for name, value in state.items()}
    try:
        with written(path) as file:
            torch.save({"fxfact": history_to_text(applied(network)), "state": plain}, file)
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
    network: nn.Module = model if history else copy_sharing(model, set())
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
    record_all(network, history)
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
