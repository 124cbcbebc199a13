"""Accumulates the second moments of one convolution over batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfact.calibration.processes import rank_and_world_size
from fxfact.calibration.row_sketch import MomentSum, RowSketch
from fxfact.conv import ConvSpec, KroneckerFisher, KroneckerMoment

MAX_DENSE_SIZE = 2304  # rows of a moment that is stored as one matrix: 256 channels of a 3×3 kernel
_MAX_STRIP = 1 << 24  # numbers in one strip of patches: 64 MiB in single precision


@dataclass(frozen=True)
class Window:
    """How patches are cut from a map: for each axis the kernel size, the stride, the padding and the dilation."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def patches(self, maps: Tensor) -> Tensor:
        """Return a view (n, channels, *positions, *kernel) of the zero-padded maps (n, channels, *size)."""
        view = F.pad(maps, [amount for pad in reversed(self.padding) for amount in (pad, pad)])
        for axis, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), start=2):
            view = view.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
        return view


class MomentAccumulator:
    """Sums the moments of one convolution's inputs and output gradients, in double precision.

    A moment of size n takes n² numbers for each group. A moment larger than ``MAX_DENSE_SIZE`` is approximated by the
    Kronecker product of two partial traces, one over channels and one over kernel positions, which takes channels² +
    positions² numbers. Such a moment of a linear layer, or of a 1×1 convolution without groups, is held by its rows.
    """

    def __init__(self, spec: ConvSpec, device: torch.device) -> None:
        positions = math.prod(spec.kernel_size)
        self.spec = spec
        self.input = _zero_sum(spec, spec.in_channels, 1 if spec.transposed else positions, device)
        self.output = _zero_sum(spec, spec.out_channels, positions if spec.transposed else 1, device)
        self.rows = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def tensors(self) -> list[Tensor]:
        """Every sum, in a fixed order, so that processes can add theirs up."""
        return [*self.input.tensors, *self.output.tensors, self.rows]

    def add(self, input: Tensor, gradient: Tensor, window: Window, fractions: Tensor) -> None:
        """Add one call of the convolution.

        Args:
            input: The input (n, in, *size).
            gradient: The gradient at the output (n, out, *size).
            window: How patches are cut.
            fractions: Numbers in [0, 1) of shape (samples, count). Each picks one position of a sample. The patches at
                these positions stand for all of them; if a sample has no more than ``count``, all are used. ``n`` must
                be a multiple of ``samples``.
        """
        transposed = self.spec.transposed
        wide, narrow = (gradient, input) if transposed else (input, gradient)
        of_wide, of_narrow = (self.output, self.input) if transposed else (self.input, self.output)
        rows = wide.new_zeros((), dtype=torch.float64)
        patches = window.patches(wide)  # with output_padding there may be more than the input has positions
        for axis, size in enumerate(narrow.shape[2:], start=2):
            patches = patches.narrow(axis, 0, size)
        for strip, weight in _patch_strips(patches, self.spec.groups, fractions):
            of_wide.add(strip, weight)
            rows += strip.shape[1] * weight
        for strip in _position_strips(narrow, self.spec.groups):
            of_narrow.add(strip[..., None], 1.0)
        self.rows += narrow.shape[0] * math.prod(narrow.shape[2:]) if transposed else rows

    def fisher(self, samples: float) -> KroneckerFisher | None:
        """Return the mean moments in single precision, or None if no gradient reached the convolution.

        Moments of gradients are means over ``samples``; moments of inputs are means over positions.
        """
        if not float(self.rows) > 0 or self.output.is_zero:
            return None
        return KroneckerFisher(self.input.moment(self.rows), self.output.moment(samples))


def _zero_sum(spec: ConvSpec, channels: int, positions: int, device: torch.device) -> MomentSum:
    """Return an empty sum for a moment over all channels of a convolution, and over some kernel positions."""
    if spec.is_pointwise and spec.groups == 1 and channels > MAX_DENSE_SIZE:
        return RowSketch(channels, device, *rank_and_world_size())
    return _MatrixSum(spec.groups, channels // spec.groups, positions, device)


class _MatrixSum(MomentSum):
    """Holds a moment as one matrix for each group, or as two if one would be too large."""

    def __init__(self, groups: int, channels: int, positions: int, device: torch.device) -> None:
        dense = channels * positions <= MAX_DENSE_SIZE or positions == 1
        sizes = [channels * positions] if dense else [channels, positions]
        self._factors = [torch.zeros(groups, size, size, dtype=torch.float64, device=device) for size in sizes]

    @property
    def tensors(self) -> list[Tensor]:
        """The matrices."""
        return self._factors

    def add(self, rows: Tensor, weight: float) -> None:
        """Add the outer products of rows."""
        _add_moment(self._factors, rows, weight)

    def moment(self, divisor: Tensor | float) -> KroneckerMoment:
        """Return the mean."""
        return KroneckerMoment(_kronecker_factors([factor / divisor for factor in self._factors]))


def _kronecker_factors(factors: list[Tensor]) -> tuple[Tensor, ...]:
    """Scale the partial traces of a moment such that their Kronecker product approximates it."""
    if len(factors) == 1:
        return (factors[0].float(),)
    total = factors[0].diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    return (factors[0].float(), (factors[1] / total.clamp_min(torch.finfo(torch.float64).tiny)).float())


def _add_moment(factors: list[Tensor], rows: Tensor, weight: float) -> None:
    """Add the second moment of ``rows`` (groups, count, channels, positions), times ``weight``."""
    if len(factors) == 1:
        flat = rows.flatten(2)
        factors[0] += weight * (flat.transpose(1, 2) @ flat)
        return
    channels, positions = rows.transpose(2, 3).flatten(1, 2), rows.flatten(1, 2)
    factors[0] += weight * (channels.transpose(1, 2) @ channels)
    factors[1] += weight * (positions.transpose(1, 2) @ positions)


def _patch_strips(patches: Tensor, groups: int, fractions: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Yield some patches of a few samples at a time, and how many patches each of them stands for.

    ``patches`` (n, channels, *positions, *kernel) become rows (groups, count, channels / groups, kernel).
    """
    order = (patches.ndim - 2) // 2
    maps = patches.shape[0] // len(fractions)  # for each sample
    sizes, kernel = patches.shape[2 : 2 + order], math.prod(patches.shape[2 + order :])
    available, taken = maps * math.prod(sizes), fractions.shape[1]
    take_all = available <= taken
    numbers = patches.shape[1] * kernel * min(available, taken)
    step = max(1, _MAX_STRIP // max(1, numbers))
    for start in range(0, len(fractions), step):
        own = fractions[start : start + step]
        part = patches[start * maps : (start + len(own)) * maps]
        part = part.reshape(len(own), maps, *part.shape[1:]) if take_all or maps > 1 else part[:, None]
        part = part.movedim(2, -1 - order)  # (samples, maps, *positions, channels, *kernel)
        if take_all:
            rows = part.reshape(-1, *part.shape[2 + order :])
        else:
            index = (own.to(part.device, torch.float64) * available).long().clamp_max(available - 1)
            places = [torch.arange(len(own), device=part.device)[:, None].expand_as(index)]
            for size in reversed((maps, *sizes)):
                places.insert(1, index % size)
                index = index // size
            rows = part[tuple(places)].flatten(0, 1)
        rows = rows.reshape(len(rows), groups, patches.shape[1] // groups, kernel).transpose(0, 1)
        yield rows.float(), 1.0 if take_all else available / taken


def _position_strips(maps: Tensor, groups: int) -> Iterator[Tensor]:
    """Yield maps (n, channels, *size) as rows (groups, count, channels / groups), a few samples at a time."""
    step = max(1, _MAX_STRIP // max(1, maps.shape[1:].numel()))
    for part in torch.split(maps, step):
        rows = part.reshape(len(part), groups, part.shape[1] // groups, -1)
        yield rows.permute(1, 0, 3, 2).flatten(1, 2).float()
