"""Milliseconds for every rank of a convolution's factorizations: few measured, the others read off between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxfact.factorizations import Factorization, Rank
from fxfact.latency import Clock
from fxfact.ranks.base import Candidate

_MEASURED = 6  # ranks of a factorization


def times_of(
    clock: Clock, candidate: Candidate, choices: Sequence[tuple[Factorization, Sequence[Rank]]]
) -> tuple[float, list[list[float]]]:
    """Of the convolution itself, and for each factorization of all its ranks, linear between those measured."""
    spec = candidate.spec
    measured = [[ranks[k] for k in _spread(len(ranks))] for _, ranks in choices]
    layouts = [f.layout(spec, rank) for (f, _), ranks in zip(choices, measured, strict=True) for rank in ranks]
    dense, *found = clock.times(candidate.path, [(spec,), *layouts])
    times = []
    for (_, ranks), own in zip(choices, measured, strict=True):
        known, found = found[: len(own)], found[len(own) :]
        sizes = [float(sum(rank)) for rank in own]
        times.append([float(ms) for ms in np.interp([float(sum(rank)) for rank in ranks], sizes, known)])
    return dense, times


def _spread(count: int) -> list[int]:
    return sorted({round(k) for k in np.linspace(0, count - 1, min(count, _MEASURED))})
