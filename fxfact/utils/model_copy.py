"""Copies of a model for work that must not change the model, and metadata that copies keep."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxfact.errors import CaptureError
from fxfact.utils.storage import is_wrapper

_METADATA = "_fxfact"
_ADVICE = "Make the class support clone() and detach(), or factorize before such tensors are put into the model."
_PRESERVED = "_user_preserved_attributes"  # an entry of a graph module's meta that copy.deepcopy keeps


def alias_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy whose parameters are new objects that share the memory of the model's parameters.

    Changes to a parameter object, such as a new ``data`` or a gradient, do not reach the model. In-place writes to its
    values do: use a ParameterGuard where they must not. Raises CaptureError if the model cannot be copied.
    """
    return _deep_copy(model, {id(parameter): _alias(parameter) for parameter in model.parameters()})


def copy_with_shared(module: nn.Module, shared: set[int]) -> nn.Module:
    """Return a deep copy that shares the tensors whose ``id`` is in ``shared``. Raises CaptureError."""
    return _deep_copy(module, {id(tensor): tensor for tensor in _tensors(module) if id(tensor) in shared})


def copy_structure(module: nn.Module) -> nn.Module:
    """Return a deep copy that shares all parameters. Raises CaptureError."""
    return copy_with_shared(module, set(map(id, module.parameters())))


def dequantize_parameters(network: nn.Module) -> nn.Module:
    """Give a network plain parameters in place of those of quantized tensor classes, and return it.

    Gradients flow through them, while operators that quantize their inputs have none that mean anything. Parameters
    whose class does not define ``dequantize()`` stay, and so do those whose inner tensors an exported graph uses.
    """
    plain: dict[int, Any] = {}
    for module in network.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.op == "call_function" and "access_subclass_inner_tensor" in str(node.target):
                kept = attrgetter(str(node.args[0].target))(module)
                plain[id(kept)] = kept
    for module in network.modules():
        for name, old in module._parameters.items():
            if is_wrapper(old) and type(old).dequantize is not Tensor.dequantize:
                if id(old) not in plain:
                    plain[id(old)] = nn.Parameter(old.detach().dequantize(), old.requires_grad)
                module._parameters[name] = plain[id(old)]
    return network


def to_eval(network: nn.Module) -> nn.Module:
    """Set evaluation mode and return the network. The mode of an exported program's module is fixed and stays."""
    with suppress(NotImplementedError):
        network.eval()
    return network


def get_metadata(network: nn.Module) -> Any:
    """Return the metadata of a network, or None if there is none."""
    return _preserved_attributes(network).get(_METADATA, getattr(network, _METADATA, None))


def set_metadata(network: nn.Module, metadata: Any) -> None:
    """Store metadata on a network. Its copies and pickles keep it. Nothing is stored for None."""
    if metadata is None:
        return
    if isinstance(network, fx.GraphModule) and isinstance(network.meta, dict):
        network.meta[_PRESERVED] = {**_preserved_attributes(network), _METADATA: metadata}
    setattr(network, _METADATA, metadata)


def _preserved_attributes(network: nn.Module) -> Mapping[str, Any]:
    """Return the attributes that copies of a graph module, and programs exported from it, keep."""
    is_graph = isinstance(network, fx.GraphModule) and isinstance(network.meta, dict)  # a submodule may be named meta
    meta: Any = network.meta if is_graph else {}
    preserved: Mapping[str, Any] = meta.get(_PRESERVED, {})
    return preserved


def _alias(parameter: Tensor) -> Tensor:
    """Return a parameter of the same class that shares the memory."""
    values, requires_grad = parameter.detach(), parameter.requires_grad
    if type(values) is Tensor:  # the constructor of a subclass of nn.Parameter may need more arguments
        alias: Tensor = Tensor._make_subclass(cast(Any, type(parameter)), values, requires_grad)
    else:
        alias = nn.Parameter(values, requires_grad=requires_grad)
    vars(alias).update({**vars(parameter), **vars(alias)})  # a wrapper subclass already has new inner tensors
    return alias


def _deep_copy(module: nn.Module, memo: dict[int, Tensor]) -> nn.Module:
    """Return a deep copy, with the tensors of ``memo`` in place of those with these ids.

    A tensor that is not a leaf of autograd, such as the weight that a pruned module computed, is copied detached.
    """
    tensors = {id(tensor): tensor for tensor in _tensors(module)}
    detached = {k: tensor.detach().clone() for k, tensor in tensors.items() if not tensor.is_leaf and k not in memo}
    try:
        with warnings.catch_warnings(), torch.no_grad():  # with gradients, tensors of a scripted copy are not leaves
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # from copying an exported program's module
            copied = copy.deepcopy(module, {**detached, **memo})
    except Exception as error:
        raise CaptureError(_why_uncopyable(module, memo, error)) from error
    for child, other in zip(module.modules(), copied.modules(), strict=False):
        if isinstance(child, torch.jit.ScriptModule):
            for one, two in zip(child.parameters(recurse=False), other.parameters(recurse=False), strict=True):
                two.requires_grad_(one.requires_grad)
    set_metadata(copied, get_metadata(module))  # deepcopy loses it if the graph module was pickled before
    return copied


def _why_uncopyable(module: nn.Module, shared: Mapping[int, Tensor], error: Exception) -> str:
    """Return the message for a module that copy.deepcopy cannot copy. It names the tensor that is the reason."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if id(tensor) not in shared and type(tensor) not in (Tensor, nn.Parameter):
            try:
                copy.deepcopy(tensor)
            except Exception as reason:
                return f"{name}: a tensor of the class {type(tensor).__name__} cannot be copied: {reason}. {_ADVICE}"
    return f"{type(module).__name__} cannot be copied: {error}. Make it support copy.deepcopy."


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers and tensors that are plain attributes."""
    for child in module.modules():
        yield from (tensor for tensor in (*child._parameters.values(), *child._buffers.values()) if tensor is not None)
        yield from (value for value in vars(child).values() if isinstance(value, Tensor))
