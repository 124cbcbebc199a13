"""SVD of the kernel as a matrix: a thinner convolution, then pointwise out.

W[o, iab] = Σ_r O[o, r] S[r, iab] (Zhang et al. 2016); for a 1×1 kernel both stages are pointwise. A transposed
convolution is the mirror image, W[i, oab] = Σ_r I[i, r] S[r, oab]: pointwise in, then a thinner transposed one, so that
in both cases the pointwise stage works on the smaller map. Stride, padding and the like sit on the thinner one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from fxfact.conv import ConvSpec, KroneckerFisher, as_matrix, sqrt_and_inverse
from fxfact.factorizations.base import Factorization, Rank
from fxfact.factorizations.linalg import tiny, truncated_svd
from fxfact.factorizations.stages import pointwise


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

    def _weights_in(
        self,
        block: ConvSpec,
        weight: Tensor,
        rank: Rank,
        *,
        metric: KroneckerFisher,
        random: torch.Generator | None,
        iterations: int,
    ) -> Sequence[Tensor]:
        """In closed form: with R the moment of the rows and Q of the columns, the leading eigenvectors U of
        R^½ W Q Wᵀ R^½ give R^-½ U · Uᵀ R^½ W (Eckart and Young in the metric).
        """
        _, vectors, half, back = _spectrum(block, weight, metric)
        leading = vectors[:, : rank[0]]
        left, right = back @ leading, leading.T @ half @ as_matrix(block, weight)
        even = (right.norm(dim=1) / left.norm(dim=0)).sqrt().clamp_min(tiny(weight) ** 0.5)
        left, right = left * even, right / even[:, None]
        if block.transposed:
            return (left.T, right.reshape(-1, block.out_channels, *block.kernel_size).transpose(0, 1))
        return (right, left)

    def _unfoldings(self, block: ConvSpec, weight: Tensor) -> Sequence[Tensor]:
        return (as_matrix(block, weight),)

    def _increases(self, block: ConvSpec, weight: Tensor, metric: KroneckerFisher) -> Mapping[Rank, float]:
        values, *_ = _spectrum(block, weight, metric)
        missed = values.double().clamp_min(0).flip(0).cumsum(0).flip(0) / 2
        rows = len(values)
        return {(r,): float(missed[r]) if r < rows else 0.0 for r in range(1, self._max_rank(block)[0] + 1)}


def _spectrum(block: ConvSpec, weight: Tensor, metric: KroneckerFisher) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors of R^½ W Q Wᵀ R^½; R^½ and its inverse."""
    rows, columns = metric.sides(block)
    half, back = sqrt_and_inverse(rows.factors[0][0])
    matrix = half @ as_matrix(block, weight)
    values, vectors = torch.linalg.eigh((columns.after(matrix) @ matrix.T).double())
    return values.flip(0).to(weight), vectors.flip(1).to(weight), half, back


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
