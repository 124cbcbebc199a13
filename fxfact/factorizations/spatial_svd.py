"""Spatial SVD: a convolution along one axis, then one along the other axes.

W[o, i, a, b] = Σ_r U[i, a, r] V[r, o, b] (the second scheme of Jaderberg, Vedaldi and Zisserman 2014; Tai et al. 2016
have the closed form).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fxfact.conv import ConvSpec, Sizes
from fxfact.factorizations.base import Factorization
from fxfact.factorizations.linalg import truncated_svd
from fxfact.factorizations.stages import Rank, split_axes, stages_along
from fxfact.factorizations.weighted_kernel import WeightedKernel, principal_directions


@final
@dataclass(frozen=True, kw_only=True)
class SpatialSVD(Factorization):
    """Spatial SVD: k×1 → 1×k, rank (R,); in three dimensions k×1×1 → 1×k×k.

    W[o, i, a, b] = Σ_r U[i, a, r] V[r, o, b] (Jaderberg, Vedaldi and Zisserman 2014), by SVD (Tai et al. 2016).

    Args:
        last_axes_first: whether the stage along the first axis comes last: 1×k → k×1.
    """

    name = "spatial_svd"

    last_axes_first: bool = False

    def _rejects(self, block: ConvSpec) -> str | None:
        if len(split_axes(block)) < 2:
            return "a kernel with fewer than two axes longer than 1 cannot be split over space"
        return None

    def _axes(self, block: ConvSpec) -> tuple[Sizes, Sizes]:
        """Return the axes of the first stage and of the second."""
        first, *others = split_axes(block)
        rest = tuple(axis for axes in others for axis in axes)
        return (rest, first) if self.last_axes_first else (first, rest)

    def _max_rank(self, block: ConvSpec) -> Rank:
        first, second = (math.prod(block.kernel_size[axis] for axis in axes) for axes in self._axes(block))
        return (min(block.in_channels * first, block.out_channels * second),)

    def _unfoldings(self, block: ConvSpec, weight: Tensor) -> Sequence[Tensor]:
        first, second = (tuple(axis + 2 for axis in axes) for axes in self._axes(block))
        kernel = weight.permute(1, *first, 0, *second)
        return (kernel.reshape(math.prod(kernel.shape[: 1 + len(first)]), -1),)

    def _loss_increases(self, kernel: WeightedKernel, ranks: Sequence[Rank]) -> Sequence[float]:
        axes = self._axes(kernel.block)
        before, after = axes[::-1] if kernel.block.transposed else axes
        tensor, (inner_root, before_root, _) = kernel.whitened(before, after)
        inner, count, last_count, _ = tensor.shape
        largest = max(r for (r,) in ranks)
        directions = principal_directions(tensor.flatten(0, 1).flatten(1))[:, :largest].reshape(inner, count, largest)
        stage = torch.einsum("iar,ij,ab->rjb", directions, inner_root.inverse, before_root.inverse)
        kept = kernel.explained_along(stage, before).square().sum(dim=1).cumsum(0)
        return [kernel.missed(float(kept[r * last_count - 1])) for (r,) in ranks]

    def _stages(self, block: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        return stages_along(block, self._axes(block), (block.in_channels, *rank, block.out_channels))

    def _weights(
        self, block: ConvSpec, weight: Tensor, rank: Rank, generator: torch.Generator | None
    ) -> Sequence[Tensor]:
        left, right = truncated_svd(self._unfoldings(block, weight)[0], *rank)
        return (left.T, right.reshape(-1, block.out_channels, right.shape[1] // block.out_channels).transpose(0, 1))
