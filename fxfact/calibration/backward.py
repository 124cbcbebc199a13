"""Collects the inputs and the output gradients of convolutions and linear layers while a backward pass runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode

from fxfact.calibration.moments import MomentAccumulator, Window
from fxfact.conv import ConvCall, LinearCallMode, as_maps
from fxfact.utils import StorageIndex, no_reduced_precision

_BACKWARD, _CAST = torch.ops.aten.convolution_backward.default, torch.ops.aten._to_copy.default
_ONE_POSITION = Window((1,), (1,), (0,), (1,))
_AddLinear = Callable[[str, Tensor, Tensor], None]


class GradientCollector(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the input and the output gradient of every convolution to its moments, during the backward pass.

    PyTorch passes both to ``convolution_backward``. The gradients of weights are not computed. During the forward pass
    it records the copies of weights in other dtypes that autocast makes, to recognize them in the backward pass. Linear
    layers have no operator of their own in the backward pass: they are computed by a function of autograd.

    Args:
        sums: The accumulators by path.
        weights: The weights by path.
    """

    supports_higher_order_operators = True

    def __init__(self, sums: Mapping[str, MomentAccumulator], weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sums, self._fractions = sums, torch.empty(0)
        self._weights, self._casts = StorageIndex(weights.items()), StorageIndex()
        linear = [(path, weight) for path, weight in weights.items() if not sums[path].spec.order]
        self._linear_layers = _ObservedLinearLayers(linear, self._add_linear)

    def __enter__(self) -> GradientCollector:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._linear_layers.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        self._linear_layers.__exit__(*raised)  # type: ignore[no-untyped-call]
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def collecting_at(self, fractions: Tensor) -> GradientCollector:
        """Return the collector, set to take patches at these fractions (samples, count) of all positions."""
        self._fractions = fractions
        return self

    def reset(self) -> None:
        """Forget the batch."""
        self._fractions, self._casts = torch.empty(0), StorageIndex()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not _BACKWARD or not len(self._fractions):  # without fractions: forward() has a backward pass
            result = func(*args, **(kwargs or {}))
            if func is _CAST and (path := self._weights.name_of(args[0])) is not None:
                self._casts.add(path, result)
            return result
        gradient, input, weight, biases, stride, padding, dilation, transposed, extra, groups, mask = args
        path = self._weights.name_of(weight) or self._casts.name_of(weight)
        if path is not None and len(input):
            with torch.no_grad(), no_reduced_precision(input.device):
                order = input.ndim - 2
                window = Window(weight.shape[2:], *(_per_axis(v, order) for v in (stride, padding, dilation)))
                samples = self._fractions
                samples = samples if len(input) % len(samples) == 0 else samples[:1]
                self._sums[path].add(input, gradient, window, samples)
        if not mask[0]:
            return None, None, None
        only_input = [True, False, False]
        return func(gradient, input, weight, biases, stride, padding, dilation, transposed, extra, groups, only_input)

    def _add_linear(self, path: str, input: Tensor, gradient: Tensor) -> None:
        """Add the input (…, in) and the output gradient (…, out) of a linear layer."""
        rows, samples = math.prod(input.shape[:-1]), self._fractions
        if not rows or not len(samples):
            return
        if rows % len(samples):  # rows that belong to no sample: as many of them are taken
            samples = samples.reshape(1, -1)
        with torch.no_grad(), no_reduced_precision(input.device):
            inputs, gradients = (as_maps(tensor, len(samples)) for tensor in (input, gradient))
            self._sums[path].add(inputs, gradients, _ONE_POSITION, samples)


def run_backward(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Run ``torch.autograd.backward``, under modes for functions too.

    ``torch.autograd.backward`` leaves such a mode, and checkpoints compute their part of the forward pass again.
    """
    options = {"allow_unreachable": True, "accumulate_grad": True}
    _engine_run_backward(tuple(tensors), tuple(gradients), False, False, (), **options)


class _ObservedLinearLayers(LinearCallMode):
    """Computes linear layers by a function of autograd that passes on their inputs and output gradients."""

    def __init__(self, weights: Sequence[tuple[str, Tensor]], add: _AddLinear) -> None:
        super().__init__(weights)
        self._add = add

    def on_linear(self, name: str, call: ConvCall, run: Callable[[], Tensor]) -> Tensor:
        """Compute the layer. Its bias gets no gradient: the network's parameters need none here."""
        matrix = call.weight if call.transposed else call.weight.T
        apply: Callable[..., Tensor] = _ObservedLinear.apply
        return apply(call.input, matrix, run, partial(self._add, name))


class _ObservedLinear(torch.autograd.Function):
    """A linear layer that computes the gradient of its input only."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, matrix: Tensor, run: Callable[[], Tensor], add: Callable[..., None]) -> Tensor:
        """Return the output of ``run`` for an input (…, in) and a matrix (in, out)."""
        ctx.save_for_backward(input, matrix)
        ctx.add = add
        return run()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None, None]:
        """Return the gradient of the input for that of the output (…, out)."""
        (gradient,), (input, matrix) = gradients, ctx.saved_tensors
        ctx.add(input, gradient)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return (gradient.to(matrix.dtype) @ matrix.T).to(input.dtype), None, None, None


def _per_axis(values: Sequence[int], order: int) -> list[int]:
    return list(values) * order if len(values) == 1 else list(values)
