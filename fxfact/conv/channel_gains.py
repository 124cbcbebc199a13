"""Finds the gains of output and input channels that turn one kernel into another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxfact.conv.spec import ConvSpec

_SWEEPS = 8


def channel_gains(spec: ConvSpec, old: Tensor, new: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the gains with ``new[o, i] = out[o] · old[o, i] · into[i]`` up to rounding, or None if there are none.

    Gains of output channels are tried first, then gains of input channels, then both. A channel without values in
    ``old`` has the gain 1.

    Args:
        spec: The convolution.
        old: The kernel before, ``(out, in / groups, *kernel)``.
        new: The kernel after, of the same shape.
        rounding: For each value of ``old``, by how much one rounding may change it. ``new`` may differ by two of them,
            and by half of one in the quadratic mean.

    Returns:
        The gains of the output channels ``(out,)`` and of the input channels ``(in,)``.
    """
    shape = (spec.groups, spec.out_channels // spec.groups, spec.in_channels // spec.groups, -1)
    before, after, step = (tensor.reshape(shape) for tensor in (old, new, rounding))
    for out, into in _candidates(before, after):
        gain = out * into
        difference, allowed = (after - before * gain).abs(), step * gain.abs()
        error = torch.where(difference == 0, 0.0, difference / allowed)
        if bool(error.amax() <= 2) and bool(error.square().mean().sqrt() <= 0.5):
            return out.flatten(), into.flatten()
    return None


def _candidates(before: Tensor, after: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield gains (groups, out, 1, 1) and (groups, 1, in, 1)."""
    out_axes, in_axes = (2, 3), (1, 3)
    out, into = before.new_ones(*before.shape[:2], 1, 1), before.new_ones(before.shape[0], 1, before.shape[2], 1)
    yield _fit(before, after, out_axes), into
    yield out, _fit(before, after, in_axes)
    # Alternating least squares from the largest output channel. A gain 0 also means: not known yet.
    largest = after.abs().sum(out_axes, keepdim=True).argmax(1, keepdim=True).expand(-1, 1, *before.shape[2:])
    into = _fit(before.gather(1, largest), after.gather(1, largest), in_axes, empty=0.0)
    for _ in range(_SWEEPS):
        into = into / into.abs().amax(2, keepdim=True)
        out = _fit(before * into, after, out_axes, empty=0.0)
        into = _fit(before * out, after, in_axes, empty=0.0)
    yield out, into


def _fit(before: Tensor, after: Tensor, axes: tuple[int, int], empty: float = 1.0) -> Tensor:
    """Return the gains that bring ``before`` nearest to ``after``, one for all values along the axes."""
    squares = before.square().sum(axes, keepdim=True)
    return torch.where(squares > 0, (before * after).sum(axes, keepdim=True) / squares, empty)
