"""Tensor-train decomposition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import final

import tensorly
import torch
from tensorly.decomposition import tensor_train
from tensorly.tt_tensor import validate_tt_rank
from torch import Tensor

from fxfact.conv import ConvSpec, Sizes
from fxfact.factorizations.base import Factorization, Rank
from fxfact.factorizations.stages import no_channel_modes, pointwise, spatial, spatial_axes


def tt(tensor: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
    """Cores (r_k, n_k, r_k+1), r at both ends 1, by TT-SVD (Oseledets 2011), which TensorLy does.

    ``ranks`` are the inner ones, one less than the tensor has modes, each within what the unfoldings can have.
    """
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return [core.contiguous() for core in tensor_train(tensor, (1, *ranks, 1)).factors]


@final
@dataclass(frozen=True, kw_only=True)
class TT(Factorization):
    """1×1 → k×1 → 1×k → 1×1, rank (r_1, …): one more entry than there are axes with a kernel size above 1."""

    name = "tt"

    def _rejects(self, block: ConvSpec) -> str | None:
        return no_channel_modes(block)

    def _max_rank(self, block: ConvSpec) -> Rank:
        sizes = _sizes(block)
        return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))

    def _unfoldings(self, block: ConvSpec, weight: Tensor) -> Sequence[Tensor]:
        sizes = _sizes(block)
        train = weight.movedim(0, -1)
        return [train.reshape(math.prod(sizes[:k]), -1) for k in range(1, len(sizes))]

    def _feasible(self, block: ConvSpec, rank: Rank) -> Rank:
        sizes = _sizes(block)
        forward = list(accumulate(zip(rank, sizes, strict=False), lambda r, n: min(n[0], r * n[1]), initial=1))[1:]
        backward = zip(reversed(forward), reversed(sizes), strict=False)
        return tuple(reversed(list(accumulate(backward, lambda r, n: min(n[0], r * n[1]), initial=1))[1:]))

    def _stages(self, block: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        axes = spatial_axes(block)
        full = [spatial(block, on, rank[k], rank[k + 1]) for k, on in enumerate(axes)]
        return (pointwise(block, block.in_channels, rank[0]), *full, pointwise(block, rank[-1], block.out_channels))

    def _weights(self, block: ConvSpec, weight: Tensor, rank: Rank, random: torch.Generator | None) -> Sequence[Tensor]:
        first, *middle, last = tt(weight.movedim(0, -1).reshape(_sizes(block)), rank)
        return (first[0].T, *(core.permute(2, 0, 1) for core in middle), last[..., 0].T)

    def _tensorly_rank(self, block: ConvSpec, fraction: float) -> Rank:
        inner = validate_tt_rank(_sizes(block), fraction)[1:-1]
        return tuple(int(r) for r in inner)


def _sizes(block: ConvSpec) -> Sizes:
    return (block.in_channels, *(size for size in block.kernel_size if size > 1), block.out_channels)
