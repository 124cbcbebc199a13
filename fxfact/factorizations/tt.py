"""Tensor train (TT): pointwise, one full convolution for each spatial axis, pointwise."""

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
from fxfact.factorizations.base import Factorization
from fxfact.factorizations.stages import Rank, split_axes, stages_along, why_no_channel_modes
from fxfact.factorizations.weighted_kernel import WeightedKernel, largest_eigenvalues, principal_directions


def tt(tensor: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
    """Return a tensor train by TT-SVD (Oseledets 2011), which TensorLy computes.

    Args:
        tensor: the tensor (n_0, …, n_d).
        ranks: the inner ranks r_1, …, r_d, none larger than the unfoldings allow.

    Returns:
        The cores (r_k, n_k, r_k+1), where r_0 and r_d+1 are 1.
    """
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return [core.contiguous() for core in tensor_train(tensor, (1, *ranks, 1)).factors]


@final
@dataclass(frozen=True, kw_only=True)
class TT(Factorization):
    """Tensor train: 1×1 → k×1 → 1×k → 1×1, rank (r_1, r_2, r_3), by TT-SVD (Oseledets 2011).

    W[o, i, a, b] = Σ_pqr I[i, p] A[p, a, q] B[q, b, r] O[r, o]. The spatial stages are not depthwise. The rank has one
    entry more than the kernel has axes longer than 1.
    """

    name = "tt"

    def _rejects(self, block: ConvSpec) -> str | None:
        return why_no_channel_modes(block)

    def _max_rank(self, block: ConvSpec) -> Rank:
        sizes = _train_sizes(block)
        return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))

    def _unfoldings(self, block: ConvSpec, weight: Tensor) -> Sequence[Tensor]:
        sizes = _train_sizes(block)
        train = weight.movedim(0, -1)
        return [train.reshape(math.prod(sizes[:k]), -1) for k in range(1, len(sizes))]

    def _feasible_rank(self, block: ConvSpec, rank: Rank) -> Rank:
        sizes = _train_sizes(block)
        forward = list(accumulate(zip(rank, sizes, strict=False), lambda r, n: min(n[0], r * n[1]), initial=1))[1:]
        backward = zip(reversed(forward), reversed(sizes), strict=False)
        return tuple(reversed(list(accumulate(backward, lambda r, n: min(n[0], r * n[1]), initial=1))[1:]))

    def _stages(self, block: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        return stages_along(block, ((), *split_axes(block), ()), (block.in_channels, *rank, block.out_channels))

    def _weights(
        self, block: ConvSpec, weight: Tensor, rank: Rank, generator: torch.Generator | None
    ) -> Sequence[Tensor]:
        first, *middle, last = tt(weight.movedim(0, -1).reshape(_train_sizes(block)), rank)
        return (first[0].T, *(core.permute(2, 0, 1) for core in middle), last[..., 0].T)

    def _loss_increases(self, kernel: WeightedKernel, ranks: Sequence[Rank]) -> Sequence[float]:
        axes = split_axes(kernel.block)
        if kernel.block.transposed:
            axes, ranks = axes[::-1], [rank[::-1] for rank in ranks]
        whitened = kernel.whitened(*axes)
        inner = principal_directions(whitened.tensor.flatten(1))
        outer = principal_directions(whitened.tensor.movedim(-1, 0).flatten(1))
        increases = []
        for first, *middle, last in ranks:
            # TT-SVD up to the last spatial stage, which is solved for
            core = torch.einsum("i...o,ir,os->r...s", whitened.tensor, inner[:, :first], outer[:, :last])
            stage = (inner[:, :first].T @ whitened.inverses[0])[..., None]
            for r, inverse in zip(middle, whitened.inverses[1:], strict=False):
                rows = core.flatten(0, 1).flatten(1)
                directions = principal_directions(rows)[:, :r]
                stage = torch.einsum(
                    "ria,rbq,bc->qiac", stage, directions.reshape(*core.shape[:2], r), inverse
                ).flatten(2)
                core = (directions.T @ rows).reshape(r, *core.shape[2:])
            explained = kernel.explained_along(stage, tuple(axis for own in axes[:-1] for axis in own))
            increases.append(kernel.missed(largest_eigenvalues(explained, last)))
        return increases

    def _tensorly_rank(self, block: ConvSpec, fraction: float) -> Rank:
        inner = validate_tt_rank(_train_sizes(block), fraction)[1:-1]
        return tuple(int(r) for r in inner)


def _train_sizes(block: ConvSpec) -> Sizes:
    return (block.in_channels, *(size for size in block.kernel_size if size > 1), block.out_channels)
