"""FactorizedModule: a convolution module, turned in place into a module that runs a chain of convolutions.

It is for models that are not traced and keep their own Python code. A factorized module is still an instance of the
convolution's class and has all its attributes, for code that reads them. Its stages are its children '0', '1', …, so
they have the same names as in a rewritten graph. It keeps the modules and tensors of its own, such as padding.
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
from fxfact.conv.modules import compose_modules, insert_base, is_conv, torch_conv_class
from fxfact.conv.spec import ConvSpec
from fxfact.errors import ArgumentError

_READ_ONLY = ("weight", "bias", "stride", "padding", "output_padding", "dilation", "groups", "padding_mode")


class FactorizedModule(nn.Module):
    """Runs its stages instead of the convolution. This base is inserted between PyTorch's class and its subclass."""

    _dense: ConvSpec
    _specs: tuple[ConvSpec, ...]
    _stage_names: tuple[str, ...]

    def forward(self, input: Tensor, output_size: object = None) -> Tensor:
        """Return the output (batch, out, *size) for an input (batch, in, *size), or both without a batch."""
        if output_size is not None:
            raise ArgumentError("a factorized transposed convolution takes no output_size. Exclude it from the plan.")
        for stage in self._chain_stages:
            input = stage(input)
        return input

    @property
    def _chain_stages(self) -> tuple[nn.Module, ...]:
        """The modules of the chain, in order, without other modules that the convolution holds."""
        return tuple(cast(nn.Module, self._modules[name]) for name in self._stage_names)

    @property
    def weight(self) -> Tensor:
        """The dense kernel in PyTorch's layout. Every access composes it anew, so writing to it has no effect."""
        return to_torch(self._dense, compose_modules(self._specs, self._convs()))

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,) of the last stage."""
        bias: Tensor | None = self._convs()[-1].bias
        return bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _READ_ONLY:
            raise ArgumentError(
                f"{name} of a factorized convolution cannot be set: it follows from its stages "
                f"{', '.join(self._stage_names)}. Set it on the stages, or change the convolution before you factorize "
                "it."
            )
        super().__setattr__(name, value)

    def _convs(self) -> list[Any]:
        return [stage for stage in self._chain_stages if is_conv(stage)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        kind = next(base for base in type(self).__mro__ if not issubclass(base, FactorizedModule))
        return _new_factorized, (kind,), vars(self)


class _ThreadState(local):
    """The placeholder kernels of the factorized modules whose forward this thread runs, by their ``id``."""

    kernels: Mapping[int, Tensor] = MappingProxyType({})


_THREAD = _ThreadState()


class _FactorizedSubclass(FactorizedModule):
    """Runs the stages when the forward of a subclass calls the functional convolution with ``self.weight``.

    During forward ``weight`` is a placeholder of the right shape, filled with NaN, so that any other use of it shows in
    the output. Each thread has its own placeholder.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = self._convs()[0].weight
        shape = to_torch(self._dense, first.new_empty(()).expand(self._dense.weight_shape)).shape
        kernel, before = first.new_full((), float("nan")).expand(shape), _THREAD.kernels
        _THREAD.kernels = {**before, id(self): kernel}
        try:
            with _RedirectConv(kernel, lambda input: FactorizedModule.forward(self, input)):
                return super().forward(*args, **kwargs)
        finally:
            _THREAD.kernels = before

    @property
    def weight(self) -> Tensor:
        """The dense kernel, or its placeholder during forward."""
        kernel: Tensor | None = _THREAD.kernels.get(id(self))
        return FactorizedModule.weight.__get__(self) if kernel is None else kernel


class _RedirectConv(TorchFunctionMode):
    """Calls ``run`` instead of a functional convolution with the weight ``kernel``."""

    def __init__(self, kernel: Tensor, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.kernel, self.run = kernel, run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = read_call(func, args, kwargs or {})
        return self.run(call.input) if call and call.weight is self.kernel else func(*args, **(kwargs or {}))


def factorize_module(
    module: nn.Module, dense: ConvSpec, specs: Sequence[ConvSpec], stages: Sequence[nn.Module]
) -> None:
    """Turn a convolution module in place into a FactorizedModule that runs ``stages``.

    It works in place so that all references to the module stay valid. Call it on private copies only.

    Args:
        module: The convolution module.
        dense: The spec of the convolution.
        specs: The specs of the stages, without pad modules.
        stages: The modules of the stages, as ``write_chain`` returns them.
    """
    kind: Any = type(module)
    module.__class__ = _factorized_class(kind)
    for name in ("weight", "bias"):
        module._parameters.pop(name, None)
    first = 1 + max((int(name) for name in module._modules if name.isdecimal()), default=-1)  # no name is taken twice
    names = tuple(str(first + index) for index in range(len(stages)))
    vars(module).update(_dense=dense, _specs=tuple(specs), _stage_names=names)
    for name, stage in zip(names, stages, strict=True):
        module.add_module(name, stage.train(module.training))


def stages_in(module: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules of a chain in the module that holds them: a FactorizedModule, or a part of a graph module.

    In a graph module their names are numbers, and no other children of such a part are named so.
    """
    if isinstance(module, FactorizedModule):
        return module._chain_stages
    return tuple(child for name, child in module.named_children() if name.isdecimal())


@cache
def _factorized_class(kind: Any) -> Any:
    base = insert_base(kind, FactorizedModule, "Factorized")
    if PLAIN_TYPES.get(kind, kind) is torch_conv_class(kind):
        return base
    return type(base.__name__, (_FactorizedSubclass, base), {"__module__": __name__})


def _new_factorized(kind: type) -> nn.Module:
    """Return a factorized module without attributes, for copy and pickle."""
    factorized = _factorized_class(kind)
    module: nn.Module = factorized.__new__(factorized)
    return module
