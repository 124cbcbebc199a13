"""SVD of the kernel as a matrix: a thinner convolution, then pointwise out.

W[o, iab] = Σ_r O[o, r] S[r, iab] (Zhang et al. 2016); for a 1×1 kernel both stages are pointwise. A transposed
convolution is the mirror image, W[i, oab] = Σ_r I[i, r] S[r, oab]: pointwise in, then a thinner transposed one, so that
in both cases the pointwise stage works on the smaller map. Stride, padding and the like sit on the thinner one.
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
        one_side = _pointwise_side(block)
        return (min(one_side, math.prod(block.weight_shape) // one_side),)

    def _stages(self, block: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        (r,) = rank
        if block.transposed:
            return (pointwise(block, block.in_channels, r), replace(block, in_channels=r))
        return (replace(block, out_channels=r), pointwise(block, r, block.out_channels))

    def _weights(self, block: ConvSpec, weight: Tensor, rank: Rank, random: torch.Generator | None) -> Sequence[Tensor]:
        mirrored = weight.transpose(0, 1) if block.transposed else weight
        left, right = truncated_svd(mirrored.flatten(1), *rank)
        if block.transposed:
            return (left.T, right.reshape(-1, block.out_channels, *block.kernel_size).transpose(0, 1))
        return (right, left)


@final
@dataclass(frozen=True, kw_only=True)
class ChannelSVD(_MatrixSVD):
    """k×k → 1×1, rank (R,); transposed 1×1 → k×k."""

    name = "channel_svd"

    def _rejects(self, block: ConvSpec) -> str | None:
        if set(block.kernel_size) == {1}:
            return "a 1×1 kernel is a matrix: pointwise_svd factorizes it"
        if _pointwise_side(block) == 1:
            side = "input" if block.transposed else "output"
            return f"a single {side} channel (of each group) leaves no channel rank to lower"
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


def _pointwise_side(block: ConvSpec) -> int:
    """The channels that get a pointwise stage of their own."""
    return block.in_channels if block.transposed else block.out_channels
