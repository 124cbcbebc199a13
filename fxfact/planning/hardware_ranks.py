"""Ranks that hardware computes efficiently, and the latencies of chains at such ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxfact.conv import ConvSpec
from fxfact.factorizations import Factorization, Rank
from fxfact.planning.strategy import Candidate, LatencyModel, Layout

_MULTIPLES = (32, 16, 8)  # in order of preference
_MIN_RANKS = 4  # use the next smaller multiple if fewer ranks than this remain
_MAX_RANKS = 12


def multiples(ranks: Sequence[Rank], number: int, max_rank: Rank) -> list[Rank]:
    """Return the ranks whose entries are multiples of ``number``, or full."""
    return [rank for rank in ranks if all(r % number == 0 or r == full for r, full in zip(rank, max_rank, strict=True))]


def hardware_friendly(ranks: Sequence[Rank], max_rank: Rank) -> list[Rank]:
    """Return up to twelve ranks, evenly spread, whose entries are full or multiples of 32.

    Kernels work on blocks of channels, and a rank between two multiples takes as long as the next block. If fewer than
    four multiples of 32 remain, multiples of 16 or 8 are used. Multiples of 8 below the smallest rank are added,
    because the fastest networks have them.
    """
    for number in _MULTIPLES:
        kept = multiples(ranks, number, max_rank)
        if len(kept) >= _MIN_RANKS:
            break
    else:
        kept = list(ranks)
    smaller = [rank for rank in multiples(ranks, _MULTIPLES[-1], max_rank) if rank < kept[0]] if kept else []
    kept = [*smaller, *kept]
    return [kept[k] for k in sorted({round(k) for k in np.linspace(0, len(kept) - 1, min(len(kept), _MAX_RANKS))})]


def chain_latencies(
    latency_model: LatencyModel, candidate: Candidate, choices: Sequence[tuple[Factorization, Sequence[Rank]]]
) -> tuple[float, list[list[float]]]:
    """Return the milliseconds of the convolution itself, and those of each factorization at each of its ranks."""
    layouts = [_chain_layout(factorization, rank) for factorization, ranks in choices for rank in ranks]
    dense, *chains = latency_model.latencies_ms(candidate.path, [_dense_layout, *layouts])
    remaining = iter(chains)
    return dense, [[next(remaining) for _ in ranks] for _, ranks in choices]


def _dense_layout(spec: ConvSpec) -> tuple[ConvSpec, ...]:
    return (spec,)


def _chain_layout(factorization: Factorization, rank: Rank) -> Layout:
    return lambda spec: factorization.layout(spec, rank)
