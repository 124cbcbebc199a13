"""What takes a convolution's place where the model keeps its own Python: the chain, in the shape of the convolution.

A stand-in is still an instance of the convolution's class with all its attributes, for the sake of code that asks, and
its stages are its children '0', '1', …, so that their names are those of a rewritten graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from threading import local
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxfact.conv.chain import to_torch
from fxfact.conv.functional import read_call
from fxfact.conv.kernels import PLAIN_TYPES
from fxfact.conv.modules import CONV_TYPES, TRANSPOSED_TYPES, compose_modules, is_conv
from fxfact.conv.spec import ConvSpec
from fxfact.errors import ArgumentError

_OF_STAGES = ("weight", "bias", "stride", "padding", "output_padding", "dilation", "groups", "padding_mode")


class FactorizedModule(nn.Module):
    """Runs its stages where the convolution would run: mixed in between PyTorch's class and a subclass of it."""

    _dense: ConvSpec
    _specs: tuple[ConvSpec, ...]

    def forward(self, input: Tensor, output_size: object = None) -> Tensor:
        """(batch, in, *size) or (in, *size) to (batch, out, *size) or (out, *size)."""
        if output_size is not None:
            raise ArgumentError("a factorized transposed convolution takes no output_size. Exclude it from the plan.")
        for stage in self._modules.values():
            input = cast(nn.Module, stage)(input)
        return input

    @property
    def weight(self) -> Tensor:
        """The dense kernel in PyTorch's layout, composed at every access: writing to it changes nothing."""
        return to_torch(self._dense, compose_modules(self._specs, self._convs()))

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), which the last stage holds."""
        bias: Tensor | None = self._convs()[-1].bias
        return bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_STAGES:
            raise ArgumentError(
                f"{name} of a factorized convolution is what its stages {', '.join(self._modules)} make of it. Set "
                "theirs, or change the convolution before it is factorized."
            )
        super().__setattr__(name, value)

    def _convs(self) -> list[Any]:
        return [stage for stage in self._modules.values() if stage is not None and is_conv(stage)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        kind = next(base for base in type(self).__mro__ if not issubclass(base, FactorizedModule))
        return _empty, (kind,), vars(self)


class _Inside(local):
    """Of a thread: what stands for the kernels of the stand-ins whose forward it is in, by their ``id``."""

    kernels: Mapping[int, Tensor] = MappingProxyType({})


_INSIDE = _Inside()


class _OfSubclass(FactorizedModule):
    """On top of a subclass whose forward calls the functional convolution with ``self.weight``: that runs the stages.

    Meanwhile ``weight`` is a stand-in too, of the right shape but all NaN, so that another use of it cannot go unseen;
    in each thread another.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = self._convs()[0].weight
        shape = to_torch(self._dense, first.new_empty(()).expand(self._dense.weight_shape)).shape
        kernel, before = first.new_full((), float("nan")).expand(shape), _INSIDE.kernels
        _INSIDE.kernels = {**before, id(self): kernel}
        try:
            with _Redirected(kernel, lambda input: FactorizedModule.forward(self, input)):
                return super().forward(*args, **kwargs)
        finally:
            _INSIDE.kernels = before

    @property
    def weight(self) -> Tensor:
        """The dense kernel, composed; within forward what stands for it."""
        kernel: Tensor | None = _INSIDE.kernels.get(id(self))
        return FactorizedModule.weight.__get__(self) if kernel is None else kernel


class _Redirected(TorchFunctionMode):
    def __init__(self, kernel: Tensor, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.kernel, self.run = kernel, run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = read_call(func, args, kwargs or {})
        return self.run(call.input) if call and call.weight is self.kernel else func(*args, **(kwargs or {}))


def factorize_module(
    module: nn.Module, dense: ConvSpec, specs: Sequence[ConvSpec], stages: Sequence[nn.Module]
) -> None:
    """Turn a convolution, in place, into a stand-in for it that runs ``stages`` (the convolutions ``specs``).

    In place, so that whatever refers to the module finds the stand-in. It is for private copies.
    """
    kind: Any = type(module)
    module.__class__ = _kind(kind)
    for name in ("weight", "bias"):
        module._parameters.pop(name, None)
    module._modules.clear()
    vars(module).update(_dense=dense, _specs=tuple(specs))
    for index, stage in enumerate(stages):
        module.add_module(str(index), stage.train(module.training))


def torch_conv_class(kind: type) -> type[nn.Module]:
    """The class of PyTorch's that a class of convolutions derives from."""
    return next(base for base in kind.__mro__ if base in CONV_TYPES + TRANSPOSED_TYPES)


def insert_base(kind: type, addition: type, prefix: str) -> type:
    """A class like ``kind`` whose ``super().forward`` reaches that of ``addition`` before that of PyTorch's class,
    which stands for what computes the same as a matrix product.
    """
    base, kind = torch_conv_class(kind), PLAIN_TYPES.get(kind, kind)
    body = {"__module__": addition.__module__}
    added = type(f"{prefix}{base.__name__}", (addition, base), body)
    return added if kind is base else type(f"{prefix}{kind.__name__}", (kind, added), body)


@cache
def _kind(kind: Any) -> Any:
    below = insert_base(kind, FactorizedModule, "Factorized")
    if PLAIN_TYPES.get(kind, kind) is torch_conv_class(kind):
        return below
    return type(below.__name__, (_OfSubclass, below), {"__module__": __name__})


def _empty(kind: type) -> nn.Module:
    """A stand-in without attributes yet, for copying and pickling."""
    made = _kind(kind)
    empty: nn.Module = made.__new__(made)
    return empty
