"""Second moments of one convolution, summed as they come."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfact.conv import ConvSpec, KroneckerFisher, KroneckerMoment

LARGEST = 2304  # rows of a moment that is kept whole: 256 channels of 3×3
_CHUNK = 1 << 24  # numbers in one strip of patches: 64 MiB in single precision


@dataclass(frozen=True)
class Window:
    """How patches are cut from a map: per axis the size of the kernel, stride, padding and dilation."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def patches(self, maps: Tensor) -> Tensor:
        """A view (n, channels, *positions, *kernel) of the zero-padded maps (n, channels, *size)."""
        view = F.pad(maps, [amount for pad in reversed(self.padding) for amount in (pad, pad)])
        for axis, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), start=2):
            view = view.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
        return view


class MomentAccumulator:
    """The moments of one convolution so far. Memory: n² and m² numbers in double precision for moments of sizes n and
    m, a group; of a moment larger than ``LARGEST`` only channels² and kernel positions² of it, whose Kronecker product
    stands for it.
    """

    def __init__(self, spec: ConvSpec, device: torch.device) -> None:
        block, positions = spec.block, math.prod(spec.kernel_size)
        self.spec = spec
        self.input = _zeros(spec.groups, block.in_channels, 1 if spec.transposed else positions, device)
        self.output = _zeros(spec.groups, block.out_channels, positions if spec.transposed else 1, device)
        self.rows = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is summed, for whoever sums further."""
        return [*self.input, *self.output, self.rows]

    def add(self, input: Tensor, gradient: Tensor, window: Window, fractions: Tensor) -> None:
        """One call: what it was given (n, in, *size), the gradient at its output (n, out, *size).

        Of the patches those are taken which stand at ``fractions`` (samples, count) of all positions, 0 … 1, and stand
        for the others; all, where there are no more. ``n`` is a multiple of the samples.
        """
        transposed = self.spec.transposed
        wide, narrow = (gradient, input) if transposed else (input, gradient)
        factors, channels = (self.output, self.input) if transposed else (self.input, self.output)
        rows = wide.new_zeros((), dtype=torch.float64)
        patches = window.patches(wide)  # of which output_padding may add some that nothing came to
        for axis, size in enumerate(narrow.shape[2:], start=2):
            patches = patches.narrow(axis, 0, size)
        for strip, weight in _strips(patches, self.spec.groups, fractions):
            _add(factors, strip, weight)
            rows += strip.shape[1] * weight
        for strip in _flat(narrow, self.spec.groups):
            _add(channels, strip[..., None], 1.0)
        self.rows += narrow.shape[0] * math.prod(narrow.shape[2:]) if transposed else rows

    def metric(self, samples: float, scale: float) -> KroneckerFisher | None:
        """The moments in single precision, gradients multiplied by ``scale``; None where no gradient came."""
        output = KroneckerMoment(_product([factor * (scale / samples) for factor in self.output]))
        if not float(self.rows) > 0 or not any(float(factor.abs().max()) > 0 for factor in output.factors):
            return None
        return KroneckerFisher(KroneckerMoment(_product([factor / self.rows for factor in self.input])), output)


def _zeros(groups: int, channels: int, positions: int, device: torch.device) -> list[Tensor]:
    whole = channels * positions <= LARGEST or positions == 1
    sizes = [channels * positions] if whole else [channels, positions]
    return [torch.zeros(groups, size, size, dtype=torch.float64, device=device) for size in sizes]


def _product(factors: list[Tensor]) -> tuple[Tensor, ...]:
    """Partial traces of a moment, made factors of which it is about the Kronecker product."""
    if len(factors) == 1:
        return (factors[0].float(),)
    total = factors[0].diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    return (factors[0].float(), (factors[1] / total.clamp_min(torch.finfo(torch.float64).tiny)).float())


def _add(factors: list[Tensor], rows: Tensor, weight: float) -> None:
    """Add the second moment of ``rows`` (groups, count, channels, positions)."""
    if len(factors) == 1:
        flat = rows.flatten(2)
        factors[0] += weight * (flat.transpose(1, 2) @ flat)
        return
    channels, positions = rows.transpose(2, 3).flatten(1, 2), rows.flatten(1, 2)
    factors[0] += weight * (channels.transpose(1, 2) @ channels)
    factors[1] += weight * (positions.transpose(1, 2) @ positions)


def _strips(patches: Tensor, groups: int, fractions: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Patches (n, channels, *positions, *kernel) as (groups, count, channels / groups, kernel), and what one counts."""
    order = (patches.ndim - 2) // 2
    maps = patches.shape[0] // len(fractions)
    sizes, kernel = patches.shape[2 : 2 + order], math.prod(patches.shape[2 + order :])
    available, taken = maps * math.prod(sizes), fractions.shape[1]
    every = available <= taken
    one = patches.shape[1] * kernel * min(available, taken)
    step = max(1, _CHUNK // max(1, one))
    for start in range(0, len(fractions), step):
        own = fractions[start : start + step]
        part = patches[start * maps : (start + len(own)) * maps]
        part = part.reshape(len(own), maps, *part.shape[1:]) if every or maps > 1 else part[:, None]
        part = part.movedim(2, -1 - order)  # (samples, maps, *positions, channels, *kernel)
        if every:
            rows = part.reshape(-1, *part.shape[2 + order :])
        else:
            index = (own.to(part.device, torch.float64) * available).long().clamp_max(available - 1)
            places = [torch.arange(len(own), device=part.device)[:, None].expand_as(index)]
            for size in reversed((maps, *sizes)):
                places.insert(1, index % size)
                index = index // size
            rows = part[tuple(places)].flatten(0, 1)
        rows = rows.reshape(len(rows), groups, patches.shape[1] // groups, kernel).transpose(0, 1)
        yield rows.float(), 1.0 if every else available / taken


def _flat(maps: Tensor, groups: int) -> Iterator[Tensor]:
    """Maps (n, channels, *size) as rows (groups, count, channels / groups), a strip of samples at a time."""
    step = max(1, _CHUNK // max(1, maps.shape[1:].numel()))
    for part in torch.split(maps, step):
        rows = part.reshape(len(part), groups, part.shape[1] // groups, -1)
        yield rows.permute(1, 0, 3, 2).flatten(1, 2).float()
