"""A convolution with its weights (ConvLayer), and a chain of convolutions that equals one convolution (ConvChain)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fxfact.conv.convolve import run_weight, with_default_strides
from fxfact.conv.spec import ConvSpec, Sizes, chain_macs
from fxfact.errors import SpecError
from fxfact.utils import no_reduced_precision


@dataclass(frozen=True, eq=False)
class ConvLayer:
    """A convolution with its weights.

    Attributes:
        spec: The shapes and settings of the convolution.
        weight: The kernel ``(out, in / groups, *kernel)``. Transposed convolutions have this layout too; ``to_torch``
            returns PyTorch's.
        bias: The bias ``(out,)``, or None.

    Raises:
        SpecError: If the tensors do not fit ``spec``.
    """

    spec: ConvSpec
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if tuple(self.weight.shape) != self.spec.weight_shape:
            raise SpecError(f"{self.spec} needs a weight of {self.spec.weight_shape}, got {tuple(self.weight.shape)}")
        if (self.bias is not None) != self.spec.bias:
            raise SpecError(f"spec.bias={self.spec.bias}, but a bias is {'missing' if self.bias is None else 'given'}")
        if self.bias is not None and tuple(self.bias.shape) != (self.spec.out_channels,):
            raise SpecError(f"{self.spec} needs a bias of ({self.spec.out_channels},), got {tuple(self.bias.shape)}")


@dataclass(frozen=True, eq=False)
class ConvChain:
    """Convolutions that run one after another and together equal one convolution.

    Attributes:
        layers: The stages. Only the last one may have a bias. At most one stage works along each spatial axis.

    Raises:
        SpecError: If there are no stages, or they do not form such a chain.
    """

    layers: tuple[ConvLayer, ...]

    def __post_init__(self) -> None:
        check_stages(self.specs)

    @property
    def specs(self) -> tuple[ConvSpec, ...]:
        """The specs of the stages."""
        return tuple(layer.spec for layer in self.layers)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the chain, which is that of the last stage."""
        return self.layers[-1].bias

    @property
    def params(self) -> int:
        """The number of parameters: all weights and the bias."""
        return sum(spec.params for spec in self.specs)

    def output_size(self, input_size: Sizes) -> Sizes:
        """Return the spatial size of the output.

        Args:
            input_size: The spatial size of the input, one int per axis.

        Returns:
            The spatial size of the output, one int per axis.
        """
        for spec in self.specs:
            input_size = spec.output_size(input_size)
        return input_size

    def macs(self, input_size: Sizes) -> int:
        """Return the multiply-accumulates (MACs) for one sample.

        Args:
            input_size: The spatial size of the input, one int per axis.

        Returns:
            The number of MACs. The additions of the bias are not counted.
        """
        return chain_macs(self.specs, input_size)


def check_stages(stages: Sequence[ConvSpec]) -> None:
    """Raise SpecError unless the stages form a chain: see ConvChain."""
    if not stages:
        raise SpecError("a chain must have at least one stage")
    for before, after in pairwise(stages):
        mixed = before.transposed != after.transposed and not (before.is_pointwise or after.is_pointwise)
        if before.out_channels != after.in_channels or mixed:
            raise SpecError(f"{after} cannot follow {before} in a chain")
        if before.bias:
            raise SpecError(f"{before} has a bias, but only the last stage of a chain may have one")
    for axis in range(len(stages[0].kernel_size)):
        active = [k for k, spec in enumerate(stages) if spec.kernel_size[axis] > 1 or spec.stride[axis] > 1]
        padding = [(k, spec.transposed) for k, spec in enumerate(stages) if spec.padding[axis] != (0, 0)]
        if len(active) > 1 or any(k < active[0] if crops else k > active[0] for k, crops in padding if active):
            raise SpecError(f"more than one stage works along axis {axis} of {[str(spec) for spec in stages]}")


def run(conv: ConvLayer | ConvChain, x: Tensor) -> Tensor:
    """Run a convolution or a chain of them.

    Args:
        conv: The convolution or the chain.
        x: The input ``(batch, in, *size)``, or ``(in, *size)`` without a batch; ``(…, in)`` for a linear layer.

    Returns:
        The output ``(batch, out, *size)``, or ``(out, *size)`` without a batch; ``(…, out)`` for a linear layer.
    """
    if isinstance(conv, ConvChain):
        for layer in conv.layers:
            x = run(layer, x)
        return x
    return run_weight(conv.spec, conv.weight, conv.bias, x)


def as_maps(rows: Tensor, count: int) -> Tensor:
    """Return the inputs or outputs of a linear layer (…, channels) as ``count`` maps (count, channels, positions).

    A linear layer is a 1×1 convolution of such maps.
    """
    positions = rows.shape[:-1].numel() // max(1, count)
    return rows.reshape(count, positions, rows.shape[-1]).movedim(-1, 1)


def compose(chain: ConvChain) -> Tensor:
    """Compute the kernel of the one convolution that the chain equals.

    For the convolution ``spec`` that a chain was made for, ``run(chain, x)`` and
    ``run(ConvLayer(spec, compose(chain), chain.bias), x)`` are equal up to rounding.

    Args:
        chain: The chain.

    Returns:
        The dense kernel ``(out, in / groups, *kernel)``.
    """
    weights = [layer.weight for layer in chain.layers]
    with no_reduced_precision(weights[0].device):
        return compose_weights(chain.specs, weights)


def composed_spec(stages: Sequence[ConvSpec]) -> ConvSpec:
    """Return the spec of the one convolution that the stages equal, whose kernel ``compose_weights`` computes.

    Along each axis all stages but one do nothing. So kernel sizes and strides multiply, and paddings add up.
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
        dilation=tuple(_composed_dilation(stages, axis) for axis in axes),
        groups=math.gcd(*(spec.groups for spec in stages)),
        padding_mode=modes[0] if modes else "zeros",
        transposed=any(spec.transposed for spec in stages),
        output_padding=tuple(sum(spec.output_padding[axis] for spec in stages) for axis in axes),
        bias=stages[-1].bias,
    )


def _composed_dilation(stages: Sequence[ConvSpec], axis: int) -> int:
    """The dilation of the stage with a kernel size above 1. Without such a stage the dilation has no effect."""
    active = [spec for spec in stages if spec.kernel_size[axis] > 1]
    return math.prod(spec.dilation[axis] for spec in active or stages)


def compose_weights(stages: Sequence[ConvSpec], weights: Sequence[Tensor]) -> Tensor:
    """Compute the kernel of a chain from the weights of its stages. torch.fx can trace it.

    If K is the kernel of the stages so far and W the weight of the next one, the new kernel is
    K'[o, i, a·b] = Σ_m W[o, m, b] K[m, i, a]. Along each axis either a or b has only one value. The kernel stays
    grouped while the groups of the stages nest. Otherwise groups are merged, with zeros between them.
    """
    kernel, size, groups = weights[0], stages[0].kernel_size, stages[0].groups
    order = len(size)
    for spec, weight in zip(stages[1:], weights[1:], strict=True):
        common = math.gcd(groups, spec.groups)
        inputs = stages[0].in_channels // common
        if common != groups:
            blocks = kernel.reshape(common, groups // common, spec.in_channels // groups, 1, -1, *size)
            eye = torch.eye(groups // common, dtype=kernel.dtype, device=kernel.device)
            kernel = blocks * eye.reshape(1, groups // common, 1, groups // common, 1, *[1] * order)
        left = weight.reshape(spec.groups, spec.out_channels // spec.groups, spec.in_channels // spec.groups, -1)
        right = kernel.reshape(spec.groups, spec.in_channels // spec.groups, inputs, -1)
        product = torch.einsum("gomb,gmia->goiba", left, right)
        product = product.reshape(spec.out_channels, inputs, *spec.kernel_size, *size)
        order_of_axes = [2 + axis + part * order for axis in range(order) for part in (0, 1)]
        size = tuple(a * b for a, b in zip(size, spec.kernel_size, strict=True))
        kernel, groups = product.permute(0, 1, *order_of_axes).reshape(spec.out_channels, inputs, *size), common
    return with_default_strides(kernel)
