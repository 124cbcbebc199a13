"""Tucker-2, the bottleneck: pointwise in, a small spatial core, pointwise out.

W[o, i, ab] = Σ_{p,q} O[o, p] C[p, q, ab] I[i, q] (Kim et al. 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from tensorly.tucker_tensor import validate_tucker_rank
from torch import Tensor

from fxfact.conv import ConvSpec
from fxfact.errors import whole
from fxfact.factorizations.base import Factorization, Rank, check_tolerance
from fxfact.factorizations.stages import no_channel_modes, pointwise
from fxfact.tensor import partial_tucker


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
        object.__setattr__(self, "sweeps", whole("sweeps", self.sweeps, 0))
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
