"""Balances the stages of a chain, so that no stage returns larger values than the chain.

A channel between two stages can be scaled: its row of the stage before is multiplied by a factor, and its column of the
stage after is divided by it. If the factor is a power of two, the chain computes the same numbers. Half precision holds
no number above 65504, and without balance a channel between the stages overflows where the output does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfact.conv import ConvSpec, compose_weights, composed_spec

_SHARE = 0.5  # of the output's gain, since the peaks of two channels with equal gains differ
_LARGEST = 2.0**15  # of a weight, as half precision holds no number from 2^16 on
_SMALLEST = 2.0**-10  # of a row's largest weight, as half precision has its full accuracy from 2^-14 on


def balance_stages(stages: Sequence[ConvSpec], weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the weights of an equal chain in which no stage has a larger gain than the chain.

    A gain is the root mean square of a channel's values for random inputs. There are four kinds of inputs: white noise,
    a constant for each channel, the same noise in all channels, and the same constant in all channels. So what the
    channels of an input have in common, for example after a ReLU, counts as well. For each kind, a channel between the
    stages has at most half of the largest gain of the chain's outputs, or of the one for white noise if that is larger.
    Channels below that keep their scale. A row is not scaled below a size that half precision holds with full accuracy.
    Then weights that are too large for half precision are scaled down, unless the composed kernel is as large.

    Args:
        stages: the stages of one group.
        weights: the elements of their weights (out, in / groups, *kernel) in order, in single or double precision.

    Returns:
        The weights in their shapes. Rows and columns are multiplied by powers of two.
    """
    return balance_together(stages, [weights])[0]


def balance_together(stages: Sequence[ConvSpec], chains: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Return the weights of chains with the same stages, balanced by common factors, so that equal weights stay equal.

    Args:
        stages: the stages of one group of every chain.
        chains: the elements of the weights of every chain, as for ``balance_stages``.

    Returns:
        The weights of every chain. A channel gets the factor of the chain that needs the smallest.
    """
    parts = [[weight.reshape(stage.weight_shape) for stage, weight in zip(stages, c, strict=True)] for c in chains]
    kernels = [compose_weights(stages, own) for own in parts]
    limits = [_limits(stages, kernel) for kernel in kernels]
    caps = [max(_LARGEST, float(kernel.abs().max()) / 4) for kernel in kernels]
    for k in range(len(stages) - 1):
        scales = [_row_scale(stages, *each, k) for each in zip(parts, limits, caps, strict=True)]
        _scale_channels(stages, parts, k, _power_of_two(torch.stack(scales).amin(dim=0)))
    for k in reversed(range(len(stages) - 1)):
        peaks = [_column_peaks(stages[k + 1], own[k + 1]) for own in parts]
        scales = [_power_of_two(cap / peak) for cap, peak in zip(caps, peaks, strict=True)]
        _scale_channels(stages, parts, k, 1 / torch.stack(scales).amin(dim=0))
    return parts


def _limits(stages: Sequence[ConvSpec], kernel: Tensor) -> Tensor:
    """Return the largest gain that a channel between the stages may have, for each kind of inputs."""
    limits = _gains(composed_spec(stages), kernel).amax(dim=1)
    return limits.maximum(limits[0]) * _SHARE


def _row_scale(stages: Sequence[ConvSpec], parts: Sequence[Tensor], limits: Tensor, cap: float, k: int) -> Tensor:
    """Return the factor for every output channel of stage k that keeps its gain within the limits."""
    head, rows = stages[: k + 1], parts[k].abs().flatten(1).amax(dim=1)
    gains = _gains(composed_spec(head), compose_weights(head, parts[: k + 1]))
    return (limits[:, None] / gains).amin(dim=0).maximum(_SMALLEST / rows).minimum(cap / rows)


def _column_peaks(stage: ConvSpec, weight: Tensor) -> Tensor:
    """Return the largest absolute value of every input channel of a stage."""
    largest = weight.abs().reshape(*weight.shape[:2], -1).amax(dim=2)
    return largest.reshape(stage.groups, -1, largest.shape[1]).amax(dim=1).flatten()


def _gains(spec: ConvSpec, kernel: Tensor) -> Tensor:
    """Return the gain of every row of a kernel (out, in / groups, *kernel), for four kinds of inputs: (4, out).

    An output of a transposed convolution only sees the kernel positions that are a multiple of the stride apart. The
    gain is the largest one over all such sets of positions.
    """
    taps = kernel.reshape(*kernel.shape[:2], -1)
    sets = _position_sets(spec).to(taps)
    sums, shared = taps @ sets, taps.sum(dim=1)
    squares = (
        taps.square().sum(dim=1) @ sets,
        sums.square().sum(dim=1),
        shared.square() @ sets,
        sums.sum(dim=1).square(),
    )
    return torch.stack([square.amax(dim=1).sqrt() for square in squares])


def _position_sets(spec: ConvSpec) -> Tensor:
    """Return which kernel positions one output sees: one column of zeros and ones for each set."""
    if not spec.transposed:
        return torch.ones(math.prod(spec.kernel_size), 1, device="cpu")
    sets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, stride, dilation in zip(spec.kernel_size, spec.stride, spec.dilation, strict=True):
        phases = torch.arange(size, device="cpu") * dilation % stride
        sets = (sets[:, None] * stride + phases).flatten()
    return F.one_hot(sets)


def _power_of_two(scale: Tensor) -> Tensor:
    """Return the largest powers of two that exceed neither a scale nor 1."""
    exponents = torch.frexp(scale.nan_to_num(nan=1.0).clamp_max(1.0)).exponent
    return torch.ldexp(torch.ones_like(scale), exponents - 1)


def _scale_channels(stages: Sequence[ConvSpec], chains: Sequence[list[Tensor]], k: int, scale: Tensor) -> None:
    """Multiply the rows of stage k of every chain by ``scale``, and divide the columns of the next stage by it."""
    after = stages[k + 1]
    by_group = scale.reshape(after.groups, 1, -1).expand(-1, after.out_channels // after.groups, -1)
    for parts in chains:
        rows = [1] * (parts[k].ndim - 1)
        parts[k] = parts[k] * scale.reshape(-1, *rows)
        parts[k + 1] = parts[k + 1] / by_group.reshape(after.out_channels, -1, *rows[1:])
