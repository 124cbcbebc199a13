"""Takes inputs and outputs of a convolution at a few random positions of every sample."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfact.calibration import Window
from fxfact.conv import ConvSpec, as_maps, pad_amounts, padded, spec_of

_POSITIONS = 32  # for each sample
SAMPLES_AT_ONCE = 8  # whose patches are in memory


def iter_patches(stage: nn.Module, maps: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield the input patches of a stage at random positions of its output, a few samples at a time.

    A patch times the stage's weight (plus the bias) is the output at that position. The patches have the shape
    (samples, positions, in · kernel), with channels first.
    """
    spec, batch = spec_of(stage), _batch(spec_of(stage), maps)
    fractions = _random_fractions(len(batch), seed)
    parts = zip(torch.split(batch, SAMPLES_AT_ONCE), torch.split(fractions, SAMPLES_AT_ONCE), strict=True)
    for part, places in parts:
        rows = _gather_positions(_patch_view(spec, part), batch.ndim - 2, places)
        yield (rows.flip(*range(3, rows.ndim)) if spec.transposed else rows).flatten(2)


def at_positions(spec: ConvSpec, maps: Tensor, seed: int) -> Tensor:
    """Copy outputs of a convolution at the positions that ``iter_patches`` takes.

    Returns rows (samples, positions, channels).
    """
    batch = _batch(spec, maps)
    return _gather_positions(batch, batch.ndim - 2, _random_fractions(len(batch), seed)).flatten(2)


def _batch(spec: ConvSpec, maps: Tensor) -> Tensor:
    """Return inputs or outputs of a convolution, of a single sample too, as (samples, channels, *size).

    The first axis of several before the channels of a linear layer counts samples, and the others positions.
    """
    batch = maps if spec.has_batch(tuple(maps.shape)) else maps[None]
    return batch if spec.order else as_maps(batch, len(batch))


def _patch_view(spec: ConvSpec, maps: Tensor) -> Tensor:
    """Return the patch for every position of the output, as a view (samples, channels, *positions, *kernel).

    A transposed convolution convolves the input, with zeros inserted, with the mirrored kernel.
    """
    if not spec.order:
        return maps
    surrounded = _insert_zeros(spec, maps) if spec.transposed else padded(spec, maps)
    stride = (1,) * spec.order if spec.transposed else spec.stride
    return Window(spec.kernel_size, stride, (0,) * spec.order, spec.dilation).patches(surrounded)


def _insert_zeros(spec: ConvSpec, maps: Tensor) -> Tensor:
    """Insert zeros between positions, as many as a transposed convolution's stride says, and around the maps."""
    sizes = [(size - 1) * step + 1 for size, step in zip(maps.shape[2:], spec.stride, strict=True)]
    spread = maps.new_zeros(*maps.shape[:2], *sizes)
    places: tuple[Any, ...] = tuple(slice(None, None, step) for step in spec.stride)
    spread[(..., *places)] = maps
    reach = [gap * (size - 1) for size, gap in zip(spec.kernel_size, spec.dilation, strict=True)]
    ends = zip(reach, spec.padding, spec.output_padding, strict=True)
    return F.pad(spread, pad_amounts([(r - first, r - last + extra) for r, (first, last), extra in ends]))


def _random_fractions(samples: int, seed: int) -> Tensor:
    """Return numbers in [0, 1) of shape (samples, positions), each of which picks a position."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(samples, _POSITIONS, dtype=torch.float64, generator=generator, device="cpu")


def _gather_positions(maps: Tensor, order: int, fractions: Tensor) -> Tensor:
    """Copy maps (samples, channels, *size, …) at the given fractions of their positions.

    All positions are taken if there are no more than ``_POSITIONS``. Returns (samples, positions, channels, …).
    """
    sizes = maps.shape[2 : 2 + order]
    available = prod(sizes)
    every = torch.arange(available, device=fractions.device).expand(len(maps), -1)
    places = every if available <= _POSITIONS else (fractions * available).long().clamp_max(available - 1)
    index: tuple[Any, ...] = torch.unravel_index(places.to(maps.device), sizes)
    return maps[(torch.arange(len(maps), device=maps.device)[:, None], slice(None), *index)]
