"""CP factorizations: pointwise to ``rank`` channels, depthwise over space, pointwise to the output channels.

``cp_factorized`` splits the spatial axes: W[o, i, a, b] = Σ_r O[o, r] I[i, r] A[a, r] B[b, r] (Lebedev et al. 2015).
``cp_mobilenet`` keeps them together: W[o, i, ab] = Σ_r O[o, r] I[i, r] S[ab, r], which is closer at the same rank.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from tensorly.cp_tensor import validate_cp_rank
from torch import Tensor

from fxfact.conv import ConvSpec, Sizes, compose_weights
from fxfact.errors import ArgumentError, check_int
from fxfact.factorizations.base import Factorization
from fxfact.factorizations.cp_als import balance_components, check_tolerance, cp, grow_cp, khatri_rao
from fxfact.factorizations.cp_fit import fit_factors
from fxfact.factorizations.linalg import squared_singular_values
from fxfact.factorizations.stages import Rank, split_axes, stages_along, why_no_channel_modes
from fxfact.factorizations.weighted_kernel import Roots, WeightedKernel

# For estimates:
_LARGEST_SWEEP = 1.5e10  # multiplications, of the largest rank that is tried
_SWEEPS, _SWEEPS_ALONE, _TOLERANCE = 10, 20, 1e-4  # before a fit, and where there is none
_SWEEPS_WORK = 5e9  # multiplications of all sweeps, beyond which there are fewer
_ITERATIONS, _LARGEST_ITERATION = 12, 7e8  # of a fit; multiplications beyond which there are fewer


@dataclass(frozen=True, kw_only=True)
class _CP(Factorization):
    init: Literal["svd", "random"] = "svd"
    sweeps: int = 50
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        object.__setattr__(self, "sweeps", check_int("sweeps", self.sweeps, 1))
        check_tolerance(self.tolerance)
        if self.init not in ("svd", "random"):
            raise ArgumentError(f"init must be 'svd' or 'random', got {self.init!r}")

    @abstractmethod
    def _spatial_modes(self, block: ConvSpec) -> tuple[Sizes, ...]:
        """Return the axes of each depthwise stage."""

    @final
    def _tensor_shape(self, block: ConvSpec) -> Sizes:
        sizes = (math.prod(block.kernel_size[axis] for axis in axes) for axes in self._spatial_modes(block))
        return (block.out_channels, block.in_channels, *sizes)

    def _rejects(self, block: ConvSpec) -> str | None:
        return why_no_channel_modes(block)

    def _max_rank(self, block: ConvSpec) -> Rank:
        shape = self._tensor_shape(block)
        return (math.prod(shape) // max(shape),)

    def _stages(self, block: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        modes = self._spatial_modes(block)
        channels = (block.in_channels, *(rank * (len(modes) + 1)), block.out_channels)
        return stages_along(block, ((), *modes, ()), channels, depthwise=True)

    def _weights(
        self, block: ConvSpec, weight: Tensor, rank: Rank, generator: torch.Generator | None
    ) -> Sequence[Tensor]:
        tensor = weight.reshape(self._tensor_shape(block))
        out, into, *space = self._factors(tensor, rank, generator)
        return (into.T, *(factor.T for factor in space), out)

    def _factors(self, tensor: Tensor, rank: Rank, generator: torch.Generator | None) -> list[Tensor]:
        if self.init == "random" and generator is None:
            raise ArgumentError(
                f"{self.name} with init='random' needs generator=torch.Generator(). Pass one, or take init='svd', "
                "which needs none."
            )
        start = generator if self.init == "random" else None
        return cp(tensor, *rank, sweeps=self.sweeps, tolerance=self.tolerance, generator=start)

    def _weights_in_metric(
        self,
        kernel: WeightedKernel,
        rank: Rank,
        *,
        start: Sequence[Tensor] | None,
        generator: torch.Generator | None,
        iterations: int,
    ) -> Sequence[Tensor]:
        whitened = kernel.whitened(*self._spatial_modes(kernel.block))
        if start is None:
            first = self._factors(whitened.tensor, rank, generator)
        else:
            first = _whitened_factors(kernel, start, whitened.roots)
        fitted = fit_factors(kernel, first[:-1], whitened.inverses, iterations=iterations)
        chains = [_stage_weights(kernel, factors, whitened.roots) for factors in (first, fitted)]
        return min(chains, key=lambda weights: self._loss_increase(kernel, rank, weights))

    def _loss_increase(self, kernel: WeightedKernel, rank: Rank, weights: Sequence[Tensor]) -> float:
        stages = self._stages(kernel.block, rank)
        shaped = [part.reshape(stage.weight_shape) for part, stage in zip(weights, stages, strict=True)]
        return kernel.metric.loss_increase(kernel.block, compose_weights(stages, shaped) - kernel.weight)

    def _spectra(self, block: ConvSpec, weight: Tensor) -> Sequence[Tensor]:
        # In the principal directions of its spatial modes, the kernel has one matrix (out, in) for each combination of
        # directions. The leading singular components of all of them are a CP decomposition.
        shape = self._tensor_shape(block)
        tensor = weight.reshape(shape)
        for mode in range(2, len(shape)):
            unfolded = tensor.movedim(mode, 0).flatten(1)
            _, directions = torch.linalg.eigh(unfolded @ unfolded.T)
            tensor = torch.tensordot(tensor, directions, dims=([mode], [0])).movedim(-1, mode)
        matrices = tensor.flatten(2).movedim(-1, 0)
        return [squared_singular_values(matrices).flatten().sort(descending=True).values]

    def _loss_increases(self, kernel: WeightedKernel, ranks: Sequence[Rank]) -> Sequence[float]:
        modes = self._spatial_modes(kernel.block)
        whitened = kernel.whitened(*modes)
        tensor, inverses = whitened.tensor, whitened.inverses
        needs_fit = not kernel.is_separable(*modes)
        factors, increases = [tensor.new_zeros(size, 0) for size in tensor.shape], list[float]()
        for (rank,) in ranks:
            work = rank * tensor.numel()
            if increases and work > _LARGEST_SWEEP:
                increases.append(increases[-1])  # at most
                continue
            sweeps = min(_SWEEPS if needs_fit else _SWEEPS_ALONE, max(3, round(_SWEEPS_WORK / work)))
            factors = grow_cp(tensor, factors, rank, sweeps=sweeps, tolerance=_TOLERANCE)
            if needs_fit:
                factors = fit_factors(
                    kernel, factors[:-1], inverses, iterations=_ITERATIONS, multiplications=_LARGEST_ITERATION
                )
            inner, *space = (inverse @ factor for inverse, factor in zip(inverses, factors, strict=False))
            explained = kernel.explained_by_components(inner.T, khatri_rao(space).T)
            increases.append(kernel.missed(float(explained.square().sum())))
        return increases

    def _tensorly_rank(self, block: ConvSpec, fraction: float) -> Rank:
        return (int(validate_cp_rank(self._tensor_shape(block), fraction)),)


def _stage_weights(kernel: WeightedKernel, factors: Sequence[Tensor], roots: Sequence[Roots]) -> list[Tensor]:
    """Return the weights of the stages from the factors of a whitened kernel.

    Every component has the same norm in each stage, because stages of like norms train best.
    """
    pairs = zip((*roots, kernel.outer_roots), factors, strict=True)
    inner, *space, outer = balance_components([own.inverse @ factor for own, factor in pairs])
    into, out = (outer, inner) if kernel.block.transposed else (inner, outer)
    return [into.T, *(factor.T for factor in space), out]


def _whitened_factors(kernel: WeightedKernel, weights: Sequence[Tensor], roots: Sequence[Roots]) -> list[Tensor]:
    """Return the factors of the whitened kernel from the weights of the stages: the inverse of ``_stage_weights``."""
    first, *space, out = (weight.flatten(1) for weight in weights)
    inner, outer = (out, first.T) if kernel.block.transposed else (first.T, out)
    pairs = zip((*roots, kernel.outer_roots), (inner, *(part.T for part in space), outer), strict=True)
    return [own.root @ factor for own, factor in pairs]


@final
@dataclass(frozen=True, kw_only=True)
class CPFactorized(_CP):
    """CP with one depthwise stage for each spatial axis: 1×1 → k×1 → 1×k → 1×1, rank (R,) (Lebedev et al. 2015).

    W[o, i, a, b] = Σ_r O[o, r] I[i, r] A[a, r] B[b, r], found by alternating least squares.

    Args:
        init: how the alternating least squares start: 'svd' at singular components, or 'random', which needs the
            argument ``generator`` of ``decompose``. Only 'svd' is exact at the largest rank.
        sweeps: the largest number of sweeps over all factors.
        tolerance: ends the sweeps if one lowers the relative error by less.

    Raises:
        ArgumentError: if an option is invalid.
    """

    name = "cp_factorized"
    restricts = "cp_mobilenet"

    def _spatial_modes(self, block: ConvSpec) -> tuple[Sizes, ...]:
        return split_axes(block)


@final
@dataclass(frozen=True, kw_only=True)
class CPMobilenet(_CP):
    """CP with all spatial axes in one mode: 1×1 → depthwise k×k → 1×1, rank (R,) (after Lebedev et al. 2015).

    W[o, i, ab] = Σ_r O[o, r] I[i, r] S[ab, r], found by alternating least squares. These are the stages of MobileNet's
    inverted residual blocks (Sandler et al. 2018).

    Args:
        init: how the alternating least squares start: 'svd' at singular components, or 'random', which needs the
            argument ``generator`` of ``decompose``. Only 'svd' is exact at the largest rank.
        sweeps: the largest number of sweeps over all factors.
        tolerance: ends the sweeps if one lowers the relative error by less.

    Raises:
        ArgumentError: if an option is invalid.
    """

    name = "cp_mobilenet"

    def _spatial_modes(self, block: ConvSpec) -> tuple[Sizes, ...]:
        return (tuple(range(len(block.kernel_size))),)
