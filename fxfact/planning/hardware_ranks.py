"""Milliseconds for ranks that hardware likes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxfact.factorizations import Factorization, Rank
from fxfact.planning.strategy import Candidate, LatencyModel, Layout

_LIKED, _FEW, _MOST = (32, 16, 8), 4, 12  # multiples, and of how many ranks to choose among


def multiples(ranks: Sequence[Rank], number: int, largest: Rank) -> list[Rank]:
    """Those whose entries are multiples of a number, or full."""
    return [rank for rank in ranks if all(r % number == 0 or r == most for r, most in zip(rank, largest, strict=True))]


def hardware_friendly(ranks: Sequence[Rank], largest: Rank) -> list[Rank]:
    """At most twelve, spread evenly, of those whose entries are full or multiples of 32, or of 16 or 8 where that
    leaves too few: kernels work on blocks of channels, and what lies between takes as long as the next block. Below the
    smallest of them multiples of 8, for the fastest networks have those.
    """
    for number in _LIKED:
        if len(kept := multiples(ranks, number, largest)) >= _FEW:
            break
    else:
        kept = list(ranks)
    below = [rank for rank in multiples(ranks, _LIKED[-1], largest) if rank < kept[0]] if kept else []
    kept = [*below, *kept]
    return [kept[k] for k in sorted({round(k) for k in np.linspace(0, len(kept) - 1, min(len(kept), _MOST))})]


def chain_latencies(
    clock: LatencyModel, candidate: Candidate, choices: Sequence[tuple[Factorization, Sequence[Rank]]]
) -> tuple[float, list[list[float]]]:
    """Of the convolution itself, and of each factorization at its ranks."""

    def chain(method: Factorization, rank: Rank) -> Layout:
        return lambda spec: method.layout(spec, rank)

    layouts = [chain(method, rank) for method, ranks in choices for rank in ranks]
    dense, *others = clock.times(candidate.path, [lambda spec: (spec,), *layouts])
    found = iter(others)
    return dense, [[next(found) for _ in ranks] for _, ranks in choices]
