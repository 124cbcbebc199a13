"""Tucker-2: a pointwise stage for each side of the channels, and a smaller core convolution between them.

W[o, i, a, b] = Σ_pq O[o, p] C[p, q, a, b] I[i, q] (Kim et al. 2016).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from tensorly.tucker_tensor import validate_tucker_rank
from torch import Tensor

from fxfact.conv import ConvSpec, sqrt_and_inverse
from fxfact.errors import check_int
from fxfact.factorizations.base import Factorization
from fxfact.factorizations.cp_als import check_tolerance, descend
from fxfact.factorizations.linalg import leading_basis
from fxfact.factorizations.shared_stages import loss_weighted_mean
from fxfact.factorizations.stages import Rank, pointwise, why_no_channel_modes
from fxfact.factorizations.weighted_kernel import Roots, WeightedKernel, largest_eigenvalues, principal_directions


def partial_tucker(
    tensor: Tensor, ranks: tuple[int, int], *, sweeps: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a Tucker decomposition over the first two modes.

    Higher-order orthogonal iteration (HOOI: De Lathauwer, De Moor and Vandewalle 2000) on Gram matrices, started at the
    sequentially truncated higher-order SVD (Vannieuwenhoven, Vandebril and Meerbergen 2012). A sweep computes the first
    basis from the second and the second from the first. Between sweeps the second basis is extrapolated (see
    ``descend``). Exact at full ranks.

    Args:
        tensor: the tensor (n_0, n_1, *rest).
        ranks: the ranks r_0 and r_1.
        sweeps: the largest number of sweeps.
        tolerance: ends the iteration if a sweep lowers the relative error by less.

    Returns:
        The orthonormal bases (n_0, r_0) and (n_1, r_1), and the core (r_0, r_1, *rest).
    """
    rest = tensor[0, 0].numel()
    middle = tensor.flatten(2).transpose(1, 2).contiguous()  # (n_0, rest, n_1), so that no product below copies
    rows, columns = middle.flatten(1), middle.flatten(0, 1)
    total = float(rows.square().sum())

    def project_second(second: Tensor) -> Tensor:
        return (columns @ second).reshape(len(rows), -1)

    def project_first(first: Tensor) -> Tensor:
        return (first.T @ rows).reshape(-1, columns.shape[1]).T

    def sweep(second: Tensor) -> tuple[Tensor, float]:
        first = leading_basis(project_second(second), ranks[0]).columns
        better, held = leading_basis(project_first(first), ranks[1])
        return better, math.sqrt(max(0.0, 1 - held / total))

    second = leading_basis(project_first(leading_basis(rows, ranks[0]).columns), ranks[1]).columns
    if total > 0 and ranks[0] < len(rows) and ranks[1] < columns.shape[1]:
        second = descend(sweep, _extrapolate, second, sweeps=sweeps, tolerance=tolerance, step=1.0, longest=1.0)
    projected = project_second(second)
    first = leading_basis(projected, ranks[0]).columns
    core = (first.T @ projected).reshape(ranks[0], rest, ranks[1]).transpose(1, 2)
    return first, second, core.reshape(*ranks, *tensor.shape[2:])


def _extrapolate(second: Tensor, before: Tensor, step: float) -> Tensor:
    """Return a subspace beyond ``second``, on the way to it from the subspace before."""
    moved = second - before @ (before.T @ second)
    ahead: Tensor = torch.linalg.qr(second + step * moved).Q
    return ahead


@final
@dataclass(frozen=True, kw_only=True)
class Tucker(Factorization):
    """Tucker-2: 1×1 → k×k → 1×1, rank (r_out, r_in) (Kim et al. 2016).

    W[o, i, ab] = Σ_pq O[o, p] C[p, q, ab] I[i, q], found by higher-order orthogonal iteration (HOOI: De Lathauwer, De
    Moor and Vandewalle 2000). A side at full rank has no pointwise stage.

    Args:
        keep_full_sides: whether a side at full rank has a pointwise stage as well.
        sweeps: the largest number of sweeps of the iteration.
        tolerance: ends the iteration if a sweep lowers the relative error by less.

    Raises:
        ArgumentError: if an option is invalid.
    """

    name = "tucker"

    keep_full_sides: bool = False
    sweeps: int = 10
    tolerance: float = 5e-4

    def __post_init__(self) -> None:
        object.__setattr__(self, "sweeps", check_int("sweeps", self.sweeps, 0))
        check_tolerance(self.tolerance)

    def _rejects(self, block: ConvSpec) -> str | None:
        return why_no_channel_modes(block)

    def _max_rank(self, block: ConvSpec) -> Rank:
        return (block.out_channels, block.in_channels)

    def _unfoldings(self, block: ConvSpec, weight: Tensor) -> Sequence[Tensor]:
        return (weight.flatten(1), weight.transpose(0, 1).flatten(1))

    def _has_pointwise(self, block: ConvSpec, rank: Rank) -> tuple[bool, bool]:
        """Return whether the output side and the input side have a pointwise stage."""
        out, into = (r < n or self.keep_full_sides for r, n in zip(rank, self._max_rank(block), strict=True))
        return out, into

    def _stages(self, block: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        out, into = self._has_pointwise(block, rank)
        first = (pointwise(block, block.in_channels, rank[1]),) if into else ()
        last = (pointwise(block, rank[0], block.out_channels),) if out else ()
        return (*first, replace(block, out_channels=rank[0], in_channels=rank[1]), *last)

    def _weights(
        self, block: ConvSpec, weight: Tensor, rank: Rank, generator: torch.Generator | None
    ) -> Sequence[Tensor]:
        out, into = self._has_pointwise(block, rank)
        first, second, core = partial_tucker(weight, (rank[0], rank[1]), sweeps=self.sweeps, tolerance=self.tolerance)
        if not out:
            core = torch.einsum("op,p...->o...", first, core)
        if not into:
            core = torch.einsum("iq,pq...->pi...", second, core)
        return (*((second.T,) if into else ()), core, *((first,) if out else ()))

    def _shared_stages(self, block: ConvSpec, rank: Rank) -> Sequence[int]:
        out, into = self._has_pointwise(block, rank)
        return (*((0,) if into else ()), *((1 + into,) if out else ()))

    def _shared_weights(self, kernels: Sequence[WeightedKernel], rank: Rank) -> Sequence[Tensor]:
        # The kernels of all layers are one tensor with more positions, in the mean metric of their channels.
        block = kernels[0].block
        inputs = [kernel.columns.channel_moment(kernel.inner) for kernel in kernels]
        outputs = [kernel.outer_roots.root @ kernel.outer_roots.root for kernel in kernels]
        roots = [
            Roots(*sqrt_and_inverse(loss_weighted_mean(kernels, [moment / moment.trace() for moment in moments])))
            for moments in (outputs, inputs)
        ]
        whitened = [torch.einsum("op,pi...,ij->oj...", roots[0].root, k.weight, roots[1].root) for k in kernels]
        scaled = [
            tensor.flatten(2) * (kernel.total**0.5 / tensor.norm().clamp_min(torch.finfo(tensor.dtype).tiny))
            for tensor, kernel in zip(whitened, kernels, strict=True)
        ]
        ranks = (rank[0], rank[1])
        first, second, _ = partial_tucker(torch.cat(scaled, 2), ranks, sweeps=self.sweeps, tolerance=self.tolerance)
        out, into = self._has_pointwise(block, rank)
        return (*((second.T @ roots[1].inverse,) if into else ()), *((roots[0].inverse @ first,) if out else ()))

    def _loss_increases(self, kernel: WeightedKernel, ranks: Sequence[Rank]) -> Sequence[float]:
        inner_outer = [rank if kernel.block.transposed else rank[::-1] for rank in ranks]
        largest = max(inner for inner, _ in inner_outer)
        tensor, (inner_root, _) = kernel.whitened(tuple(range(len(kernel.kernel_size))))
        rows = principal_directions(tensor.flatten(1))[:, :largest].T @ inner_root.inverse
        explained = kernel.explained_along(rows[..., None], ())
        return [
            kernel.missed(largest_eigenvalues(explained[: inner * kernel.positions], outer))
            for inner, outer in inner_outer
        ]

    def _tensorly_rank(self, block: ConvSpec, fraction: float) -> Rank:
        shape = (block.out_channels, block.in_channels, *block.kernel_size)
        out, into, *_ = validate_tucker_rank(shape, fraction, fixed_modes=list(range(2, len(shape))))
        return (int(out), int(into))
