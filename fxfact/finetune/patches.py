"""What is looked at of maps: some positions of every sample, and what a convolution takes at them."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfact.calibration import Window
from fxfact.conv import ConvSpec, pad_amounts, padded, spec_of

_POSITIONS = 32  # of a sample that are looked at
PART = 8  # samples whose patches are held at once


def iter_patches(stage: nn.Module, maps: Tensor, seed: int) -> Iterator[Tensor]:
    """What a stage's weight is multiplied with, at the positions looked at, a part of the samples after the other: rows
    (samples, positions, in · kernel), channels first.
    """
    spec = spec_of(stage)
    batch = maps if maps.ndim == spec.order + 2 else maps[None]
    fractions = _fractions(len(batch), seed)
    for part, places in zip(torch.split(batch, PART), torch.split(fractions, PART), strict=True):
        rows = _gathered(_patches(spec, part), spec.order, places)
        yield (rows.flip(*range(3, rows.ndim)) if spec.transposed else rows).flatten(2)


def _patches(spec: ConvSpec, maps: Tensor) -> Tensor:
    """A view (samples, channels, *positions, *kernel) of what a convolution takes of every channel for each position of
    its output; of a transposed one, which convolves maps that are spread by its stride, with the kernel mirrored.
    """
    around = _spread(spec, maps) if spec.transposed else padded(spec, maps)
    stride = (1,) * spec.order if spec.transposed else spec.stride
    return Window(spec.kernel_size, stride, (0,) * spec.order, spec.dilation).patches(around)


def _spread(spec: ConvSpec, maps: Tensor) -> Tensor:
    """Maps, their positions apart by a transposed convolution's stride, within zeros as wide as its kernel reaches."""
    sizes = [(size - 1) * step + 1 for size, step in zip(maps.shape[2:], spec.stride, strict=True)]
    spread = maps.new_zeros(*maps.shape[:2], *sizes)
    apart: tuple[Any, ...] = tuple(slice(None, None, step) for step in spec.stride)
    spread[(..., *apart)] = maps
    reach = [gap * (size - 1) for size, gap in zip(spec.kernel_size, spec.dilation, strict=True)]
    ends = zip(reach, spec.padding, spec.output_padding, strict=True)
    return F.pad(spread, pad_amounts([(r - first, r - last + extra) for r, (first, last), extra in ends]))


def at_positions(maps: Tensor, order: int, seed: int) -> Tensor:
    """The maps (samples, channels, *size), or of one sample, at the positions looked at: a copy of their own."""
    batch = maps if maps.ndim == order + 2 else maps[None]
    return _gathered(batch, order, _fractions(len(batch), seed)).flatten(2)


def _fractions(samples: int, seed: int) -> Tensor:
    """Of all positions, 0 … 1."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.rand(samples, _POSITIONS, dtype=torch.float64, generator=drawn, device="cpu")


def _gathered(maps: Tensor, order: int, fractions: Tensor) -> Tensor:
    """A copy (samples, positions, channels, …) of maps (samples, channels, *size, …) at those fractions of their
    positions; at all, where there are no more.
    """
    sizes = maps.shape[2 : 2 + order]
    available = prod(sizes)
    every = torch.arange(available, device=fractions.device).expand(len(maps), -1)
    places = every if available <= _POSITIONS else (fractions * available).long().clamp_max(available - 1)
    index: tuple[Any, ...] = torch.unravel_index(places.to(maps.device), sizes)
    return maps[(torch.arange(len(maps), device=maps.device)[:, None], slice(None), *index)]
