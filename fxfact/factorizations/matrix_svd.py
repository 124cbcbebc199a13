"""SVD of the kernel as a matrix: a thinner convolution, then pointwise out.

W[o, iab] = Σ_r O[o, r] S[r, iab] (Zhang et al. 2016); for a 1×1 kernel both stages are pointwise. Stride and padding
sit on the first stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from fxfact.conv import ConvSpec
from fxfact.factorizations.base import Factorization, Rank, pointwise
from fxfact.tensor import truncated_svd


@dataclass(frozen=True, kw_only=True)
class _MatrixSVD(Factorization):
    def _max_rank(self, block: ConvSpec) -> Rank:
        return (min(block.out_channels, math.prod(block.weight_shape[1:])),)

    def _stages(self, block: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        (r,) = rank
        return (replace(block, out_channels=r), pointwise(block, r, block.out_channels))

    def _weights(self, block: ConvSpec, weight: Tensor, rank: Rank, random: torch.Generator | None) -> Sequence[Tensor]:
        left, right = truncated_svd(weight.flatten(1), *rank)
        return (right, left)


@final
@dataclass(frozen=True, kw_only=True)
class ChannelSVD(_MatrixSVD):
    """k×k → 1×1, rank (R,)."""

    name = "channel_svd"

    def _rejects(self, block: ConvSpec) -> str | None:
        if set(block.kernel_size) == {1}:
            return "a 1×1 kernel is a matrix: pointwise_svd factorizes it"
        if block.out_channels == 1:
            return "a single output channel (of each group) leaves no channel rank to lower"
        return None


@final
@dataclass(frozen=True, kw_only=True)
class PointwiseSVD(_MatrixSVD):
    """1×1 → 1×1, for 1×1 kernels only, rank (R,)."""

    name = "pointwise_svd"

    def _rejects(self, block: ConvSpec) -> str | None:
        if set(block.kernel_size) != {1}:
            return f"the kernel is not 1×1 but {'×'.join(map(str, block.kernel_size))}"
        if min(block.in_channels, block.out_channels) == 1:
            return "a single channel (of each group) leaves no rank to lower"
        return None
