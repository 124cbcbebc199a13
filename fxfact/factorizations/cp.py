"""CP: pointwise into ``rank`` channels, depthwise over space, pointwise out.

``cp_factorized`` has 1-D spatial stages: W[o, i, a, b] = Σ_r O[o, r] I[i, r] A[a, r] B[b, r] (Lebedev et al. 2015);
``cp_mobilenet`` keeps space as one mode: W[o, i, ab] = Σ_r O[o, r] I[i, r] S[ab, r], which at equal rank is nearer.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from tensorly.cp_tensor import validate_cp_rank
from torch import Tensor

from fxfact.conv import ConvSpec, Sizes
from fxfact.errors import ArgumentError, check_int
from fxfact.factorizations.base import Factorization, Rank, check_tolerance
from fxfact.factorizations.cp_als import cp
from fxfact.factorizations.linalg import singular_squares
from fxfact.factorizations.stages import no_channel_modes, pointwise, spatial, spatial_axes

_SWEEP = 5e8  # multiplications


@dataclass(frozen=True, kw_only=True)
class _CP(Factorization):
    """``init`` 'svd' begins at singular components and needs no generator; 'random' draws from the generator given.

    ``sweeps`` and ``tolerance`` (in relative error, by sweep) end the alternating least squares.
    """

    init: Literal["svd", "random"] = "svd"
    sweeps: int = 50
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        object.__setattr__(self, "sweeps", check_int("sweeps", self.sweeps, 1))
        check_tolerance(self.tolerance)
        if self.init not in ("svd", "random"):
            raise ArgumentError(f"init must be 'svd' or 'random', got {self.init!r}")

    @abstractmethod
    def _modes(self, block: ConvSpec) -> tuple[Sizes, ...]:
        """The spatial axes of each spatial stage."""

    @final
    def _sizes(self, block: ConvSpec) -> Sizes:
        sizes = (math.prod(block.kernel_size[axis] for axis in axes) for axes in self._modes(block))
        return (block.out_channels, block.in_channels, *sizes)

    def _rejects(self, block: ConvSpec) -> str | None:
        return no_channel_modes(block)

    def _max_rank(self, block: ConvSpec) -> Rank:
        sizes = self._sizes(block)
        return (math.prod(sizes) // max(sizes),)

    def _stages(self, block: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        (r,) = rank
        depthwise = [spatial(block, axes, r, r, groups=r) for axes in self._modes(block)]
        return (pointwise(block, block.in_channels, r), *depthwise, pointwise(block, r, block.out_channels))

    def _weights(self, block: ConvSpec, weight: Tensor, rank: Rank, random: torch.Generator | None) -> Sequence[Tensor]:
        if self.init == "random" and random is None:
            raise ArgumentError(f"{self.name} with init='random' needs generator=torch.Generator()")
        start = random if self.init == "random" else None
        tensor = weight.reshape(self._sizes(block))
        out, into, *space = cp(tensor, *rank, sweeps=self.sweeps, tolerance=self.tolerance, random=start)
        return (into.T, *(factor.T for factor in space), out)

    def _spectra(self, block: ConvSpec, weight: Tensor) -> Sequence[Tensor]:
        """Turned to the principal directions of its spatial modes, the kernel is one matrix (out, in) for each of their
        combinations; the leading singular components of all of them are a CP decomposition.
        """
        sizes = self._sizes(block)
        tensor = weight.reshape(sizes)
        for mode in range(2, len(sizes)):
            unfolded = tensor.movedim(mode, 0).flatten(1)
            _, directions = torch.linalg.eigh(unfolded @ unfolded.T)
            tensor = torch.tensordot(tensor, directions, dims=([mode], [0])).movedim(-1, mode)
        matrices = tensor.flatten(2).movedim(-1, 0)
        return [singular_squares(matrices).flatten().sort(descending=True).values]

    def _foreseeing(self, block: ConvSpec, rank: Rank) -> _CP:
        """With fewer sweeps, ten at least, where one takes more than 5·10⁸ multiplications; not at random."""
        share = min(1.0, _SWEEP / (2 * rank[0] * math.prod(self._sizes(block))))
        return replace(self, init="svd", sweeps=min(self.sweeps, max(10, round(self.sweeps * share))))

    def _tensorly_rank(self, block: ConvSpec, fraction: float) -> Rank:
        return (int(validate_cp_rank(self._sizes(block), fraction)),)


@final
@dataclass(frozen=True, kw_only=True)
class CPFactorized(_CP):
    """1×1 → depthwise k×1 → depthwise 1×k → 1×1, rank (R,)."""

    name = "cp_factorized"

    def _modes(self, block: ConvSpec) -> tuple[Sizes, ...]:
        return spatial_axes(block)


@final
@dataclass(frozen=True, kw_only=True)
class CPMobilenet(_CP):
    """1×1 → depthwise k×k → 1×1, rank (R,)."""

    name = "cp_mobilenet"

    def _modes(self, block: ConvSpec) -> tuple[Sizes, ...]:
        return (tuple(range(block.order)),)
