"""A convolution with its numbers, and a chain of them that equals one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfact.conv.spec import ConvSpec, Sizes, pad_amounts
from fxfact.errors import SpecError
from fxfact.utils import no_reduced_precision

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True, eq=False)
class ConvLayer:
    """A convolution with its numbers: ``weight`` (out, in / groups, *kernel), ``bias`` (out,) or None."""

    spec: ConvSpec
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if tuple(self.weight.shape) != self.spec.weight_shape:
            raise SpecError(f"{self.spec} needs a weight of {self.spec.weight_shape}, got {tuple(self.weight.shape)}")
        if (self.bias is not None) != self.spec.bias:
            raise SpecError(f"spec.bias={self.spec.bias}, but bias is {'absent' if self.bias is None else 'given'}")
        if self.bias is not None and tuple(self.bias.shape) != (self.spec.out_channels,):
            raise SpecError(f"{self.spec} needs a bias of ({self.spec.out_channels},), got {tuple(self.bias.shape)}")


@dataclass(frozen=True, eq=False)
class ConvChain:
    """Convolutions applied one after the other, equal to one convolution.

    Only the last may have a bias, and every spatial axis belongs to one stage: raises SpecError otherwise.
    """

    layers: tuple[ConvLayer, ...]

    def __post_init__(self) -> None:
        check_stages(self.specs)

    @property
    def specs(self) -> tuple[ConvSpec, ...]:
        """The shapes of the stages."""
        return tuple(layer.spec for layer in self.layers)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the whole, which the last stage holds."""
        return self.layers[-1].bias

    @property
    def params(self) -> int:
        """Numbers in all weights and the bias."""
        return sum(spec.params for spec in self.specs)

    def output_size(self, input_size: Sizes) -> Sizes:
        """Spatial size behind the chain, for the spatial size before it."""
        for spec in self.specs:
            input_size = spec.output_size(input_size)
        return input_size

    def macs(self, input_size: Sizes) -> int:
        """Multiply-accumulates for one sample of this spatial size."""
        return chain_macs(self.specs, input_size)


def chain_macs(stages: Sequence[ConvSpec], input_size: Sizes) -> int:
    """Multiply-accumulates of stages run one after the other on one sample of this spatial size."""
    total = 0
    for spec in stages:
        total += spec.macs(input_size)
        input_size = spec.output_size(input_size)
    return total


def check_stages(stages: Sequence[ConvSpec]) -> None:
    """Raise SpecError unless the stages fit one behind the other into a chain."""
    if not stages:
        raise SpecError("a chain has at least one stage")
    for before, after in pairwise(stages):
        turned = before.transposed != after.transposed and not (before.is_pointwise or after.is_pointwise)
        if before.out_channels != after.in_channels or turned:
            raise SpecError(f"{after} cannot follow {before} in a chain")
        if before.bias:
            raise SpecError(f"{before} has a bias, which only the last stage of a chain may have")
    for axis in range(stages[0].order):
        busy = [k for k, spec in enumerate(stages) if spec.kernel_size[axis] > 1 or spec.stride[axis] > 1]
        padding = [(k, spec.transposed) for k, spec in enumerate(stages) if spec.padding[axis] != (0, 0)]
        if len(busy) > 1 or any(k < busy[0] if crops else k > busy[0] for k, crops in padding if busy):
            raise SpecError(f"axis {axis} belongs to more than one stage of {[str(spec) for spec in stages]}")


def run(conv: ConvLayer | ConvChain, x: Tensor) -> Tensor:
    """The output for ``x`` (batch, in, *size), or (in, *size) without a batch."""
    if isinstance(conv, ConvChain):
        for layer in conv.layers:
            x = run(layer, x)
        return x
    return run_weight(conv.spec, conv.weight, conv.bias, x)


def run_weight(spec: ConvSpec, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """``run`` for bare tensors. Everything but the tensors comes from ``spec``, so it can be traced."""
    if spec.transposed:
        padding = [before for before, _ in spec.padding]
        weight = to_torch(spec, weight)
        transposed = _CONV_TRANSPOSE[spec.order - 1]
        return transposed(x, weight, bias, spec.stride, padding, spec.output_padding, spec.groups, spec.dilation)
    plain = spec.padding_mode == "zeros" and all(before == after for before, after in spec.padding)
    if not plain:
        x = padded(spec, x)
    padding = [before for before, _ in spec.padding] if plain else [0] * spec.order
    return _CONV[spec.order - 1](x, weight, bias, spec.stride, padding, spec.dilation, spec.groups)


def padded(spec: ConvSpec, x: Tensor) -> Tensor:
    """``x`` with what a convolution that is not transposed puts around it."""
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    return F.pad(x, pad_amounts(spec.padding), mode=mode)


def to_torch(spec: ConvSpec, weight: Tensor) -> Tensor:
    """Our weight (out, in / groups, *kernel) in PyTorch's layout: for a transposed one, (in, out / groups, *kernel)."""
    return _plainly_strided(_swap_channels(weight, spec.groups)) if spec.transposed else weight


def from_torch(spec: ConvSpec, weight: Tensor) -> Tensor:
    """The inverse of ``to_torch``, without copying where that can be."""
    return _swap_channels(weight, spec.groups) if spec.transposed else weight


def compose(chain: ConvChain) -> Tensor:
    """The dense kernel (out, in / groups, *kernel) that the chain equals."""
    weights = [layer.weight for layer in chain.layers]
    with no_reduced_precision(weights[0].device):
        return compose_weights(chain.specs, weights)


def composed_spec(stages: Sequence[ConvSpec]) -> ConvSpec:
    """The one convolution that the stages of a chain are, its kernel being ``compose_weights``.

    On every axis the stages but one do nothing, so that strides and kernel sizes multiply and paddings add up.
    """
    check_stages(stages)
    modes = [spec.padding_mode for spec in stages if spec.padding_mode != "zeros"]
    axes = range(stages[0].order)
    return ConvSpec(
        in_channels=stages[0].in_channels,
        out_channels=stages[-1].out_channels,
        kernel_size=tuple(math.prod(spec.kernel_size[axis] for spec in stages) for axis in axes),
        stride=tuple(math.prod(spec.stride[axis] for spec in stages) for axis in axes),
        padding=tuple(
            (sum(s.padding[axis][0] for s in stages), sum(s.padding[axis][1] for s in stages)) for axis in axes
        ),
        dilation=tuple(_dilation(stages, axis) for axis in axes),
        groups=math.gcd(*(spec.groups for spec in stages)),
        padding_mode=modes[0] if modes else "zeros",
        transposed=any(spec.transposed for spec in stages),
        output_padding=tuple(sum(spec.output_padding[axis] for spec in stages) for axis in axes),
        bias=stages[-1].bias,
    )


def _dilation(stages: Sequence[ConvSpec], axis: int) -> int:
    """That of the stage whose kernel reaches along the axis; where none does it means nothing."""
    reaching = [spec for spec in stages if spec.kernel_size[axis] > 1]
    return math.prod(spec.dilation[axis] for spec in reaching or stages)


def compose_weights(stages: Sequence[ConvSpec], weights: Sequence[Tensor]) -> Tensor:
    """``compose`` for bare tensors. Everything but the tensors comes from ``stages``, so it can be traced.

    With K the kernel so far and W the next stage, K'[o, i, a·b] = Σ_m W[o, m, b] K[m, i, a]; on every axis one of
    a and b has a single value. Groups are kept as long as the stages' groups nest, else merged with zeros between.
    """
    kernel, size, groups = weights[0], stages[0].kernel_size, stages[0].groups
    order = len(size)
    for spec, weight in zip(stages[1:], weights[1:], strict=True):
        common = math.gcd(groups, spec.groups)
        inputs = stages[0].in_channels // common
        if common != groups:
            blocks = kernel.reshape(common, groups // common, spec.in_channels // groups, 1, -1, *size)
            apart = torch.eye(groups // common, dtype=kernel.dtype, device=kernel.device)
            kernel = blocks * apart.reshape(1, groups // common, 1, groups // common, 1, *[1] * order)
        left = weight.reshape(spec.groups, spec.out_channels // spec.groups, spec.in_channels // spec.groups, -1)
        right = kernel.reshape(spec.groups, spec.in_channels // spec.groups, inputs, -1)
        product = torch.einsum("gomb,gmia->goiba", left, right)
        product = product.reshape(spec.out_channels, inputs, *spec.kernel_size, *size)
        order_of_axes = [2 + axis + part * order for axis in range(order) for part in (0, 1)]
        size = tuple(a * b for a, b in zip(size, spec.kernel_size, strict=True))
        kernel, groups = product.permute(0, 1, *order_of_axes).reshape(spec.out_channels, inputs, *size), common
    return _plainly_strided(kernel)


def _plainly_strided(weight: Tensor) -> Tensor:
    """Contiguous, and with the strides that a new tensor would have on axes of size 1 too, where others do not count.

    PyTorch 2.13 reads them as a memory format, and can crash: a grouped ``conv1d`` with kernel size 1 and dilation 3.
    """
    return weight.reshape(-1).reshape(weight.shape)


def _swap_channels(weight: Tensor, groups: int) -> Tensor:
    first, second, *kernel = weight.shape
    blocks = weight.reshape(groups, first // groups, second, *kernel)
    return blocks.transpose(1, 2).reshape(groups * second, first // groups, *kernel)
