"""Copies of a model's structure, for work that must not touch the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxfact.errors import CaptureError

_NOTED = "_fxfact"
_PRESERVED = "_user_preserved_attributes"  # of a graph module's meta: copy.deepcopy keeps them


def alias_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters are new objects on the model's own memory. Raises CaptureError.

    What is done to a parameter object (a new ``data``, a gradient) does not reach the model; writes to its memory do,
    and a ParameterGuard forbids them.
    """
    return _copied(model, {id(parameter): _alias(parameter) for parameter in model.parameters()})


def copy_with_shared(module: nn.Module, shared: set[int]) -> nn.Module:
    """A deep copy that keeps, and does not copy, the tensors whose ``id`` is in ``shared``. Raises CaptureError."""
    return _copied(module, {id(tensor): tensor for tensor in _tensors(module) if id(tensor) in shared})


def copy_structure(module: nn.Module) -> nn.Module:
    """``copy_sharing`` of all parameters: of a private copy another one."""
    return copy_with_shared(module, set(map(id, module.parameters())))


def to_eval(network: nn.Module) -> nn.Module:
    """The network itself, put in evaluation mode, unless it is an exported program's module, whose mode is exported."""
    with suppress(NotImplementedError):
        network.eval()
    return network


def get_metadata(network: nn.Module) -> Any:
    """What was noted on a network, None where nothing was."""
    return _preserved(network).get(_NOTED, getattr(network, _NOTED, None))


def set_metadata(network: nn.Module, what: Any) -> None:
    """Note something on a network, which its copies and pickles keep; nothing for None."""
    if what is None:
        return
    if isinstance(network, fx.GraphModule) and isinstance(network.meta, dict):
        network.meta[_PRESERVED] = {**_preserved(network), _NOTED: what}
    setattr(network, _NOTED, what)


def _preserved(network: nn.Module) -> Mapping[str, Any]:
    """What copies of a graph module, and programs made of it, keep; ``meta`` may be a module of the model's own."""
    meta = network.meta if isinstance(network, fx.GraphModule) and isinstance(network.meta, dict) else {}
    kept: Mapping[str, Any] = meta.get(_PRESERVED, {})
    return kept


def _alias(parameter: Tensor) -> Tensor:
    """A parameter of the same class on the same memory."""
    held, grad = parameter.detach(), parameter.requires_grad
    if type(held) is Tensor:  # of a parameter, or of a subclass of nn.Parameter, whose own constructor may ask for more
        alias: Tensor = Tensor._make_subclass(cast(Any, type(parameter)), held, grad)
    else:
        alias = nn.Parameter(held, requires_grad=grad)
    vars(alias).update(vars(parameter))
    return alias


def _copied(module: nn.Module, memo: dict[int, Tensor]) -> nn.Module:
    """A tensor that is no leaf of autograd, such as the weight that a pruned module computed, is copied detached."""
    own = {id(tensor): tensor for tensor in _tensors(module)}
    values = {key: tensor.detach().clone() for key, tensor in own.items() if not tensor.is_leaf and key not in memo}
    try:
        with warnings.catch_warnings(), torch.no_grad():  # with gradients the tensors of scripted copies are no leaves
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # of copying an exported program's module
            made = copy.deepcopy(module, {**values, **memo})
    except Exception as error:
        raise CaptureError(
            f"{type(module).__name__} cannot be copied: {error}. Make it support copy.deepcopy."
        ) from error
    for child, other in zip(module.modules(), made.modules(), strict=False):
        if isinstance(child, torch.jit.ScriptModule):
            for one, two in zip(child.parameters(recurse=False), other.parameters(recurse=False), strict=True):
                two.requires_grad_(one.requires_grad)
    set_metadata(made, get_metadata(module))  # of a graph module that was pickled, copies do not keep it by themselves
    return made


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and tensors that are plain attributes."""
    for child in module.modules():
        yield from (tensor for tensor in (*child._parameters.values(), *child._buffers.values()) if tensor is not None)
        yield from (value for value in vars(child).values() if isinstance(value, Tensor))
