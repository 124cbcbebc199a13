"""The weight of a layer of stages: a tensor whose changes reach the stages, or raise an error.

Code for convolutions edits their weights in place: it folds norms into them, scales their channels, initializes, clips
or merges them. A layer of stages has no dense weight. Its ``weight`` is a tensor with the values of the kernel that the
stages compose to. What is written to it, to a view of it or to its ``data``, is written to the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._pytree import tree_leaves, tree_map_only

from fxfact.conv.stage_writes import StagedLayer, as_parameters, refusal, stage_parameters, write_weight

_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(eq=False)
class _Source:
    """What the aliases of one read of a weight share.

    Attributes:
        layer: The layer.
        values: The memory of the aliases, in the shape of the weight.
        stamp: Identifies the values of the stages that ``values`` was composed of.
    """

    layer: StagedLayer
    values: Tensor
    stamp: _Stamp = field(init=False)

    def __post_init__(self) -> None:
        self.stamp = _stamp_of(self.layer)

    def refresh(self) -> None:
        """Compose the values again."""
        with as_parameters(self.layer):
            self.values.copy_(self.layer._composed())
        self.stamp = _stamp_of(self.layer)

    def assign(self, values: Tensor) -> None:
        """Write values to the stages. Afterwards the aliases have the values of the stages, also after an error."""
        try:
            write_weight(self.layer, values, keep_parameters=True)
        finally:
            self.refresh()


class ComposedWeight(Tensor):
    """The weight of a StagedLayer, or a view of it. Operations return plain tensors, and writes reach the layer.

    Attributes:
        source: What it shares with the other aliases.
        is_whole: Whether it is what the layer returned, and no view of it.
    """

    source: _Source
    is_whole: bool

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not all(issubclass(cls, kind) for kind in types):
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs) if torch.compiler.is_compiling() else _call(func, args, kwargs)

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to use other memory. PyTorch does not pass this method to ``__torch_function__``."""
        raise refusal(self.source.layer, "its weight cannot use the memory of another tensor")

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        """Become an ordinary parameter with its own memory. ``nn.Parameter(weight)`` sets this attribute."""
        requires_grad = self.requires_grad
        with torch._C.DisableTorchFunctionSubclass():
            self.data = self.detach().clone()
            vars(self).clear()
            cast(Any, self).__class__ = nn.Parameter
        self.requires_grad_(requires_grad)


def _stamp_of(layer: StagedLayer) -> _Stamp:
    weights = [weight for weight in stage_parameters(layer) if type(weight) is nn.Parameter]
    return tuple((id(w), -1 if w.is_inference() else w._version, w.data_ptr()) for w in weights)


def linked_weight(layer: StagedLayer) -> Tensor:
    """Return the composed weight. It is a plain tensor while a graph is traced or compiled."""
    if torch.compiler.is_compiling():
        return layer._composed()
    is_traced = get_proxy_mode() is not None or torch._C._get_tracing_state() is not None
    first = next(stage_parameters(layer))  # a Proxy if torch.fx traces
    if is_traced or not isinstance(first, Tensor) or torch._C._functorch.peek_interpreter_stack() is not None:
        return layer._composed()
    with torch.autocast(first.device.type, enabled=False):  # which does not touch the dtype of parameters either
        if torch.is_inference_mode_enabled():
            with as_parameters(layer):
                composed = layer._composed()
        else:
            composed = layer._composed()
    if type(composed) is not Tensor:  # a fake tensor, or another subclass that the stages hold
        return composed
    with as_parameters(layer):
        source = _Source(layer, composed.detach())
    return _alias(composed, source, is_whole=True)


def _alias(tensor: Tensor, source: _Source, *, is_whole: bool = False) -> ComposedWeight:
    alias = cast(ComposedWeight, tensor.as_subclass(cast(Any, ComposedWeight)))
    alias.source, alias.is_whole = source, is_whole
    return alias


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function with aliases among its arguments, and write to the layer what it writes to them."""
    first = args[0] if args else None
    if type(first) is ComposedWeight and first.is_whole and (special := _OF_PARAMETERS.get(func)):
        return special(first, *args[1:], **kwargs)
    aliases = [leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) is ComposedWeight]
    if _writes(func, kwargs):
        for alias in aliases:
            _prepare_write(alias)
    versions = [alias._version for alias in aliases]
    result = func(*args, **kwargs)
    written = [alias for alias, version in zip(aliases, versions, strict=True) if alias._version != version]
    for source in dict.fromkeys(alias.source for alias in written):
        source.assign(source.values)
    return _link_views(result, aliases)


def _link_views(result: Any, aliases: list[ComposedWeight]) -> Any:
    """Return a result whose tensors that share memory with a weight are aliases, and whose arrays are read-only."""
    sources = list(dict.fromkeys(alias.source for alias in aliases))
    if isinstance(result, np.ndarray):
        if any(np.may_share_memory(result, source.values.numpy()) for source in sources):
            result.setflags(write=False)
        return result

    def link(tensor: Tensor) -> Tensor:
        if type(tensor) is not Tensor:
            return tensor
        shared = [source for source in sources if cast(Any, torch._C)._is_alias_of(tensor, source.values)]
        return _alias(tensor, shared[0]) if shared else tensor

    return tree_map_only(Tensor, link, result)


def _writes(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the name of a function says that it may write to a tensor."""
    name = getattr(func, "__name__", "").partition(".")[0]
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or name.startswith("__i") or kwargs.get("out") is not None


def _prepare_write(alias: ComposedWeight) -> None:
    """Bring an alias up to date, so that what is written to it is compared with the stages of now."""
    source = alias.source
    if torch.is_grad_enabled() and alias.requires_grad:
        raise refusal(source.layer, "its weight requires grad, and is written to outside of torch.no_grad()")
    if source.stamp != _stamp_of(source.layer):
        source.refresh()


# What code does with a parameter that is more than a read or a write of its values


def _set_data(alias: ComposedWeight, values: Tensor) -> None:
    write_weight(alias.source.layer, values, keep_parameters=True)
    with as_parameters(alias.source.layer):
        alias.source.values = alias.source.layer._composed().detach()
        alias.data = alias.source.values
    alias.source.refresh()


def _set_requires_grad(alias: ComposedWeight, requires_grad: bool = True) -> ComposedWeight:
    for weight in stage_parameters(alias.source.layer):
        weight.requires_grad_(requires_grad)
    return alias


def _set_grad(alias: ComposedWeight, grad: Tensor | None) -> None:
    if grad is not None:
        raise refusal(alias.source.layer, "a gradient cannot be set on its weight. Its stages have the gradients")
    for weight in stage_parameters(alias.source.layer):
        weight.grad = None


def _refuse(what: str) -> Callable[..., Any]:
    def refuse(alias: ComposedWeight, *args: Any, **kwargs: Any) -> Any:
        raise refusal(alias.source.layer, what)

    return refuse


def _on_copy(name: str) -> Callable[..., Any]:
    """Return a function that calls a method of an independent plain tensor with the same values."""

    def call(alias: ComposedWeight, *args: Any, **kwargs: Any) -> Any:
        copy = alias.detach().as_subclass(Tensor).clone().requires_grad_(alias.requires_grad)
        return getattr(copy, name)(*args, **kwargs)

    return call


_NO_HOOKS = "hooks on its weight would not be called. Register them on the weights of the stages"
_TENSOR: Any = Tensor
_OF_PARAMETERS: dict[Any, Callable[..., Any]] = {
    _TENSOR.data.__set__: _set_data,
    _TENSOR.requires_grad.__set__: _set_requires_grad,
    _TENSOR.requires_grad_: _set_requires_grad,
    _TENSOR.grad.__set__: _set_grad,
    _TENSOR.register_hook: _refuse(_NO_HOOKS),
    _TENSOR.register_post_accumulate_grad_hook: _refuse(_NO_HOOKS),
    _TENSOR.is_leaf.__get__: lambda alias: False,
    # Optimizers ask this to find out if they can train a tensor that is not a leaf.
    _TENSOR.retains_grad.__get__: _refuse(
        "an optimizer cannot train its weight, which is composed. Pass the parameters() of the layer"
    ),
    _TENSOR.__deepcopy__: _on_copy("__deepcopy__"),
    _TENSOR.__reduce_ex__: _on_copy("__reduce_ex__"),
}
