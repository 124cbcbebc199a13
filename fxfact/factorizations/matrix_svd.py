"""SVD of the kernel as a matrix: a convolution with fewer output channels, then a pointwise one.

W[o, iab] = Σ_r O[o, r] S[r, iab] (Zhang et al. 2016). If the kernel is 1×1, both stages are pointwise; if the layer is
linear, both are linear layers. A transposed convolution is mirrored: W[i, oab] = Σ_r I[i, r] S[r, oab], first a
pointwise stage, then a transposed convolution with fewer input channels. In both cases the pointwise stage works on the
smaller map. The other stage has the stride, the padding and the dilation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from fxfact.conv import ConvSpec, as_matrix
from fxfact.factorizations.base import Factorization
from fxfact.factorizations.linalg import truncated_svd
from fxfact.factorizations.shared_stages import loss_weighted_mean, mean_diagonal
from fxfact.factorizations.stages import Rank, pointwise
from fxfact.factorizations.weighted_kernel import WeightedKernel


@dataclass(frozen=True, kw_only=True)
class _MatrixSVD(Factorization):
    is_fitted = False

    def _max_rank(self, block: ConvSpec) -> Rank:
        pointwise_side, other_side = block.out_channels, block.in_channels
        if block.transposed:
            pointwise_side, other_side = other_side, pointwise_side
        return (min(pointwise_side, other_side * math.prod(block.kernel_size)),)

    def _stages(self, block: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        (r,) = rank
        if block.transposed:
            last = replace(block, in_channels=r) if block.order else pointwise(block, r, block.out_channels)
            return (pointwise(block, block.in_channels, r), last)
        return (replace(block, out_channels=r), pointwise(block, r, block.out_channels))

    def _shared_stages(self, block: ConvSpec, rank: Rank) -> Sequence[int]:
        return (0,)

    def _shared_weights(self, kernels: Sequence[WeightedKernel], rank: Rank) -> Sequence[Tensor]:
        # Let T = R^½ W. The best last stages keep tr(T Q Sᵀ (S Q Sᵀ)⁻¹ S Q Tᵀ), summed over the layers. If all layers
        # have the moment Q, the best S is Uᵀ T, where T has the rows of all layers, and U the leading eigenvectors of
        # T Q Tᵀ. Here Q is the mean of the layers' moments.
        sizes = [mean_diagonal(kernel.columns) for kernel in kernels]
        targets = [kernel.target * size**0.5 for kernel, size in zip(kernels, sizes, strict=True)]
        rows = torch.linalg.qr(torch.cat(targets), mode="r").R  # fewer rows, with the same Tᵀ T
        grams = [kernel.columns.gram(rows) / size for kernel, size in zip(kernels, sizes, strict=True)]
        _, vectors = torch.linalg.eigh(loss_weighted_mean(kernels, grams))
        right = vectors[:, -rank[0] :].T @ rows
        scale = right.norm(dim=1).sqrt().clamp_min(torch.finfo(right.dtype).tiny ** 0.5)
        return (right / scale[:, None],)

    def _weights(
        self, block: ConvSpec, weight: Tensor, rank: Rank, generator: torch.Generator | None
    ) -> Sequence[Tensor]:
        return _stage_weights(block, *truncated_svd(as_matrix(block, weight), *rank))

    def _weights_in_metric(
        self,
        kernel: WeightedKernel,
        rank: Rank,
        *,
        start: Sequence[Tensor] | None,
        generator: torch.Generator | None,
        iterations: int,
    ) -> Sequence[Tensor]:
        # With R the moment of the rows and Q that of the columns, and U the leading eigenvectors of R^½ W Q Wᵀ R^½, the
        # best chain is R^-½ U · Uᵀ R^½ W (Eckart and Young in the metric).
        leading = kernel.directions[:, : rank[0]].to(kernel.weight)
        left, right = kernel.outer_roots.inverse @ leading, leading.T @ kernel.target
        smallest = torch.finfo(right.dtype).tiny ** 0.5
        balance = (right.norm(dim=1) / left.norm(dim=0)).sqrt().clamp_min(smallest)
        return _stage_weights(kernel.block, left * balance, right.div_(balance[:, None]))

    def _unfoldings(self, block: ConvSpec, weight: Tensor) -> Sequence[Tensor]:
        return (as_matrix(block, weight),)

    def _loss_increases(self, kernel: WeightedKernel, ranks: Sequence[Rank]) -> Sequence[float]:
        return [float(kernel.spectrum[r:].sum()) / 2 for (r,) in ranks]


def _stage_weights(block: ConvSpec, left: Tensor, right: Tensor) -> Sequence[Tensor]:
    """Return the weights of the two stages, from the factors of the kernel as a matrix."""
    if block.transposed:
        return (left.T, right.reshape(-1, block.out_channels, *block.kernel_size).transpose(0, 1))
    return (right, left)


@final
@dataclass(frozen=True, kw_only=True)
class ChannelSVD(_MatrixSVD):
    """Channel SVD: k×k → 1×1, rank (R,); transposed 1×1 → k×k (Zhang et al. 2016).

    W[o, iab] = Σ_r O[o, r] S[r, iab], by SVD, also in a Fisher metric.
    """

    name = "channel_svd"

    def _rejects(self, block: ConvSpec) -> str | None:
        if set(block.kernel_size) == {1}:
            return "a 1×1 kernel is a matrix: use svd"
        side, channels = ("input", block.in_channels) if block.transposed else ("output", block.out_channels)
        if channels == 1:
            return f"a single {side} channel (of each group) leaves no channel rank to lower"
        return None


@final
@dataclass(frozen=True, kw_only=True)
class SVD(_MatrixSVD):
    """SVD of a matrix: 1×1 → 1×1 or linear → linear, rank (R,), for 1×1 kernels and linear layers only.

    W[o, i] = Σ_r O[o, r] I[r, i], by SVD (Eckart and Young 1936), also in a Fisher metric.
    """

    name = "svd"
    factorizes_linear = True

    def _rejects(self, block: ConvSpec) -> str | None:
        if not {*block.kernel_size} <= {1}:
            return f"the kernel is {'×'.join(map(str, block.kernel_size))}, not 1×1"
        if min(block.in_channels, block.out_channels) == 1:
            return "a single channel (of each group) leaves no rank to lower"
        return None
