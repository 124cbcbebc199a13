"""Tucker decomposition over the first two modes, the later ones kept whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from tensorly.tucker_tensor import validate_tucker_rank
from torch import Tensor

from fxfact.conv import ConvSpec
from fxfact.errors import check_int
from fxfact.factorizations.base import Factorization, Rank, check_tolerance
from fxfact.factorizations.linalg import descend, leading_basis
from fxfact.factorizations.stages import no_channel_modes, pointwise


def partial_tucker(
    tensor: Tensor, ranks: tuple[int, int], *, sweeps: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``first`` (n_0, r_0), ``second`` (n_1, r_1), orthonormal, and ``core`` (r_0, r_1, *rest).

    Higher-order orthogonal iteration (De Lathauwer, De Moor and Vandewalle 2000) on Gram matrices, begun at the
    sequentially truncated higher-order SVD. A sweep finds the first basis for the second and the second for the first;
    the second is extrapolated between sweeps, and the end is decided as ``descend`` says. Exact at full ranks.
    """
    rest = tensor[0, 0].numel()
    middle = tensor.flatten(2).transpose(1, 2).contiguous()  # (n_0, rest, n_1), so that no product below copies
    rows, columns = middle.flatten(1), middle.flatten(0, 1)
    total = float(rows.square().sum())

    def with_second(second: Tensor) -> Tensor:
        return (columns @ second).reshape(len(rows), -1)

    def with_first(first: Tensor) -> Tensor:
        return (first.T @ rows).reshape(-1, columns.shape[1]).T

    def sweep(second: Tensor) -> tuple[Tensor, float]:
        first = leading_basis(with_second(second), ranks[0]).columns
        better, held = leading_basis(with_first(first), ranks[1])
        return better, math.sqrt(max(0.0, 1 - held / total))

    second = leading_basis(with_first(leading_basis(rows, ranks[0]).columns), ranks[1]).columns
    if total > 0 and ranks[0] < len(rows) and ranks[1] < columns.shape[1]:
        second = descend(sweep, _extrapolate, second, sweeps=sweeps, tolerance=tolerance, step=1.0, longest=1.0)
    joined = with_second(second)
    first = leading_basis(joined, ranks[0]).columns
    core = (first.T @ joined).reshape(ranks[0], rest, ranks[1]).transpose(1, 2)
    return first, second, core.reshape(*ranks, *tensor.shape[2:])


def _extrapolate(second: Tensor, before: Tensor, step: float) -> Tensor:
    """Beyond a subspace, on the way to it from the one before."""
    moved = second - before @ (before.T @ second)
    ahead: Tensor = torch.linalg.qr(second + step * moved).Q
    return ahead


@final
@dataclass(frozen=True, kw_only=True)
class Tucker(Factorization):
    """1×1 → k×k → 1×1, rank (r_out, r_in). A side at full rank drops its 1×1, unless ``keep_full_sides``.

    ``sweeps`` and ``tolerance`` (in relative error, by sweep) end the orthogonal iteration.
    """

    name = "tucker"

    keep_full_sides: bool = False
    sweeps: int = 10
    tolerance: float = 5e-4

    def __post_init__(self) -> None:
        object.__setattr__(self, "sweeps", check_int("sweeps", self.sweeps, 0))
        check_tolerance(self.tolerance)

    def _rejects(self, block: ConvSpec) -> str | None:
        return no_channel_modes(block)

    def _max_rank(self, block: ConvSpec) -> Rank:
        return (block.out_channels, block.in_channels)

    def _unfoldings(self, block: ConvSpec, weight: Tensor) -> Sequence[Tensor]:
        return (weight.flatten(1), weight.transpose(0, 1).flatten(1))

    def _kept(self, block: ConvSpec, rank: Rank) -> tuple[bool, bool]:
        """Whether the output and the input side have a stage."""
        out, into = (r < n or self.keep_full_sides for r, n in zip(rank, self._max_rank(block), strict=True))
        return out, into

    def _stages(self, block: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        out, into = self._kept(block, rank)
        first = (pointwise(block, block.in_channels, rank[1]),) if into else ()
        last = (pointwise(block, rank[0], block.out_channels),) if out else ()
        return (*first, replace(block, out_channels=rank[0], in_channels=rank[1]), *last)

    def _weights(self, block: ConvSpec, weight: Tensor, rank: Rank, random: torch.Generator | None) -> Sequence[Tensor]:
        out, into = self._kept(block, rank)
        first, second, core = partial_tucker(weight, (rank[0], rank[1]), sweeps=self.sweeps, tolerance=self.tolerance)
        if not out:
            core = torch.einsum("op,p...->o...", first, core)
        if not into:
            core = torch.einsum("iq,pq...->pi...", second, core)
        return (*((second.T,) if into else ()), core, *((first,) if out else ()))

    def _tensorly_rank(self, block: ConvSpec, fraction: float) -> Rank:
        shape = (block.out_channels, block.in_channels, *block.kernel_size)
        out, into, *_ = validate_tucker_rank(shape, fraction, fixed_modes=list(range(2, len(shape))))
        return (int(out), int(into))
