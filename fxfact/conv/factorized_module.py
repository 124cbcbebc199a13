"""FactorizedModule: a convolution or linear module, turned in place into a module that runs a chain of such layers.

It is for models that are not traced and keep their own Python code. A factorized module is still an instance of the
convolution's class and has all its attributes, for code that reads them. Its stages are its children '0', '1', …, so
they have the same names as in a rewritten graph. It keeps the modules and tensors of its own, such as padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from threading import local
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxfact.conv.composed_layer import ComposedLayer, OwnParameters
from fxfact.conv.functional import read_call
from fxfact.conv.kernels import PLAIN_TYPES
from fxfact.conv.modules import (
    CHANNELS_LAST,
    insert_base,
    is_conv,
    is_conv_class,
    memory_format_of,
    overrides_conv_forward,
    run_stages,
    torch_conv_class,
)
from fxfact.conv.spec import ConvSpec
from fxfact.conv.stage_writes import ComposedChain
from fxfact.errors import ArgumentError
from fxfact.utils import no_reduced_precision

_READ_ONLY = ("stride", "padding", "output_padding", "dilation", "groups", "padding_mode")


class FactorizedModule(ComposedLayer):
    """Runs its stages instead of the convolution. This base is inserted between PyTorch's class and its subclass."""

    _dense: ConvSpec
    _specs: tuple[ConvSpec, ...]
    _stage_names: tuple[str, ...]

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Return the output (batch, out, *size) for an input (batch, in, *size), or both without a batch.

        ``output_size`` is for transposed convolutions only, as in PyTorch.
        """
        return self._run_chain(input, output_size)

    def _run_chain(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return run_stages(self._chain_stages, self._dense, input, output_size)

    @property
    def _chain_stages(self) -> tuple[nn.Module, ...]:
        """The modules of the chain, in order, without other modules that the convolution holds."""
        return tuple(cast(nn.Module, self._modules[name]) for name in self._stage_names)

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
        return _new_factorized, (_original_class(self),), vars(self)

    @torch.inference_mode(False)
    def to_conv(self) -> nn.Module:
        """Compose the layer to the convolution that it replaced.

        Returns:
            A new convolution of the original class with the composed kernel in its weight, and with copies of the other
            tensors and modules that this layer holds.
        """
        convs = self._convs()
        with torch.no_grad(), no_reduced_precision(convs[0].weight.device):
            weight = self._composed().clone(memory_format=torch.contiguous_format)
        if any(memory_format_of(conv.weight) is not torch.contiguous_format for conv in convs):
            weight = weight.contiguous(memory_format=CHANNELS_LAST[weight.ndim])
        conv, bias = copy.deepcopy(self), self.bias
        for name in self._stage_names:
            del conv._modules[name]
        for name in ("_dense", "_specs", "_stage_names", "_path", "_shared_names"):
            vars(conv).pop(name, None)
        vars(conv)["_parameters"] = dict(conv._parameters)
        cast(Any, conv).__class__ = _original_class(self)
        trained = any(stage.weight.requires_grad for stage in convs)
        conv.register_parameter("weight", nn.Parameter(weight, requires_grad=trained))
        conv.register_parameter("bias", None if bias is None else copy.deepcopy(cast(nn.Parameter, bias)))
        return conv

    def to_linear(self) -> nn.Module:
        """Compose the layer to the linear layer that it replaced, as ``to_conv`` does for a convolution.

        Returns:
            A new linear layer of the original class.

        Raises:
            ArgumentError: If the layer replaced a convolution with spatial axes.
        """
        if self._dense.order:
            raise ArgumentError(f"this layer replaced {self._dense}, not a linear layer: use to_conv()")
        return self.to_conv()

    def _chain(self) -> ComposedChain:
        stages = zip(self._stage_names, self._chain_stages, strict=True)
        return ComposedChain(self._dense, self._specs, {name: stage for name, stage in stages if is_conv(stage)})

    def _has_bias(self, bias: bool) -> None:
        specs = (*self._specs[:-1], replace(self._specs[-1], bias=bias))
        vars(self).update(_dense=replace(self._dense, bias=bias), _specs=specs)


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
        first = next(self._convs()[0].parameters())  # not an attribute, which torch.fx would take for a read of it
        nan = torch.full((), float("nan"), dtype=first.dtype, device=first.device)
        kernel, before = nan.expand(self._dense.torch_weight_shape), _THREAD.kernels
        _THREAD.kernels = {**before, id(self): kernel}
        try:
            with _RedirectConv(self._dense, kernel, self._run_chain):
                return super().forward(*args, **kwargs)
        finally:
            _THREAD.kernels = before

    @property
    def weight(self) -> Tensor:
        """The dense kernel, or its placeholder during forward."""
        kernel: Tensor | None = _THREAD.kernels.get(id(self))
        return FactorizedModule.weight.__get__(self) if kernel is None else kernel


class _FactorizedConvForward(FactorizedModule):
    """For a subclass that replaces ``_conv_forward``: PyTorch's ``forward`` calls it, and it calls a function."""

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Return what ``_conv_forward`` of the subclass returns."""
        output: Tensor = super(FactorizedModule, self).forward(input)
        return output


class _RedirectConv(TorchFunctionMode):
    """Calls ``run`` instead of a functional convolution with the weight ``kernel`` and the settings of ``dense``."""

    def __init__(self, dense: ConvSpec, kernel: Tensor, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.dense, self.kernel, self.run = dense, kernel, run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = read_call(func, args, kwargs or {})
        if call is None or call.weight is not self.kernel:
            return func(*args, **(kwargs or {}))
        spec = call.spec_for(self.kernel.shape, bias=call.bias is not None)
        if spec == self.dense:
            return self.run(call.input)
        if spec.transposed and replace(spec, output_padding=self.dense.output_padding) == self.dense:
            return self.run(call.input, spec.output_size(tuple(call.input.shape[-spec.order :])))
        raise ArgumentError(
            f"forward calls a factorized convolution as {spec}, but it replaces {self.dense}. Exclude this convolution "
            "when you factorize the model, or keep its settings."
        )


def factorize_module(
    module: nn.Module,
    dense: ConvSpec,
    specs: Sequence[ConvSpec],
    stages: Sequence[nn.Module],
    path: str = "",
    *,
    shared: Sequence[int] = (),
) -> None:
    """Turn a convolution module in place into a FactorizedModule that runs ``stages``.

    It works in place so that all references to the module stay valid. Call it on private copies only.

    Args:
        module: The convolution module.
        dense: The spec of the convolution.
        specs: The specs of the stages, without pad modules.
        stages: The modules of the stages, as ``write_chain`` returns them.
        path: The path of the module in its network, for messages.
        shared: The indices of the stages whose weights other layers hold too.
    """
    kind: Any = type(module)
    module.__class__ = _factorized_class(kind)
    for name in ("weight", "bias"):
        if name == "weight" or dense.bias or module._parameters.get(name) is None:
            module._parameters.pop(name, None)
    first = 1 + max((int(name) for name in module._modules if name.isdecimal()), default=-1)  # no name is taken twice
    names = tuple(str(first + index) for index in range(len(stages)))
    convs = [name for name, stage in zip(names, stages, strict=True) if is_conv(stage)]
    vars(module).update(_dense=dense, _specs=tuple(specs), _stage_names=names, _path=path)
    vars(module).update(_shared_names=tuple(convs[k] for k in shared))
    vars(module)["_parameters"] = OwnParameters(cast(ComposedLayer, module), module._parameters)
    for name, stage in zip(names, stages, strict=True):
        module.add_module(name, stage.train(module.training))


def stages_in(module: nn.Module) -> tuple[nn.Module, ...]:
    """Return the modules of a chain in the module that holds them: a FactorizedModule, or a part of a graph module.

    In a graph module their names are numbers, and no other children of such a part are named so.
    """
    if isinstance(module, FactorizedModule):
        return module._chain_stages
    return tuple(child for name, child in module.named_children() if name.isdecimal())


def _original_class(module: FactorizedModule) -> type:
    """Return the class that the module had before, or PyTorch's if it computed the same differently."""
    return next(base for base in type(module).__mro__ if is_conv_class(base) and not issubclass(base, FactorizedModule))


@cache
def _factorized_class(kind: Any) -> Any:
    addition = _FactorizedConvForward if overrides_conv_forward(kind) else FactorizedModule
    base = insert_base(kind, addition, "Factorized")
    if PLAIN_TYPES.get(kind, kind) is torch_conv_class(kind):
        return base
    return type(base.__name__, (_FactorizedSubclass, base), {"__module__": __name__})


def _new_factorized(kind: type) -> nn.Module:
    """Return a factorized module without attributes, for copy and pickle."""
    factorized = _factorized_class(kind)
    module: nn.Module = factorized.__new__(factorized)
    return module
