"""The contract of a factorization, and what every one of them inherits from it.

A factorization is a frozen value that knows two things of one convolution without groups: the shapes of the stages
for a rank (``_stages``) and their weights (``_weights``). Groups, biases, precisions and ranks by fraction are the
same for all and live here. Laws, each tested for every factorization:
- ``layout(spec, rank)`` equals the specs of ``decompose(layer, rank)``, which it needs no tensor for;
- ``layout`` maps any input size to the output size of ``spec``;
- at ``max_rank`` the chain composes to the kernel itself (CP: begun at singular components, its default).
"""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from fxfact.conv import ConvChain, ConvLayer, ConvSpec, KroneckerFisher, Skip, compose
from fxfact.errors import ArgumentError, RankError, RefusedError
from fxfact.factorizations.fit import fit_chain, in_channel_metric
from fxfact.factorizations.linalg import singular_squares
from fxfact.factorizations.scaling import cast_factors, check_weight, pow2_scale
from fxfact.utils import no_reduced_precision

Rank = tuple[int, ...]
_FITTED, _FORESEEN = 200, 12  # iterations of the fit in a metric: of weights to be used, of errors to be planned with


@dataclass(frozen=True, kw_only=True)
class Factorization(ABC):
    """How a convolution becomes a chain of convolutions. The options of one are its (JSON-able) dataclass fields."""

    name: ClassVar[str]

    @abstractmethod
    def _rejects(self, block: ConvSpec) -> str | None:
        """Why one group's convolution cannot be factorized, or None."""

    @abstractmethod
    def _max_rank(self, block: ConvSpec) -> Rank:
        """The largest useful rank, entry by entry."""

    @abstractmethod
    def _stages(self, block: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        """The stages for one group, all without bias."""

    @abstractmethod
    def _weights(self, block: ConvSpec, weight: Tensor, rank: Rank, random: torch.Generator | None) -> Sequence[Tensor]:
        """The stages' weights, in single or double precision, for a weight (out, in, *kernel)."""

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
        """``_weights`` that are near in a metric: begun in the metric of the channels, then fitted in all of it."""
        stages = self._stages(replace(block, bias=False), rank)

        def nearest(kernel: Tensor) -> list[Tensor]:
            found = self._weights(block, kernel, rank, random)
            return [part.reshape(stage.weight_shape) for part, stage in zip(found, stages, strict=True)]

        if stages[0].groups > 1 or stages[-1].groups > 1:  # no matrix of the metric's channels goes into such a stage
            return nearest(weight)
        start = in_channel_metric(block, weight, metric, nearest)
        return fit_chain(block, stages, start, weight, metric, iterations=iterations)

    def _increases(self, block: ConvSpec, weight: Tensor, metric: KroneckerFisher) -> Mapping[Rank, float] | None:
        """By how much the loss grows at every rank, where a formula says it."""
        return None

    def _unfoldings(self, block: ConvSpec, weight: Tensor) -> Sequence[Tensor]:
        """For every entry of the rank the matrix whose rank it bounds; none where the rank is of no matrix."""
        return ()

    def _spectra(self, block: ConvSpec, weight: Tensor) -> Sequence[Tensor]:
        """For every entry of the rank squares, descending, of which what lies behind the rank is lost in the Frobenius
        norm, or an upper bound of it; none where no formula says that.
        """
        return [singular_squares(matrix) for matrix in self._unfoldings(block, weight)]

    def _foreseeing(self, block: ConvSpec, rank: Rank) -> Factorization:
        """What stands for this one where only its increase of the loss is wanted, and need not be exact."""
        return self

    def _feasible(self, block: ConvSpec, rank: Rank) -> Rank:
        """``rank``, already within ``_max_rank``, lowered where its entries bound each other."""
        return rank

    def _tensorly_rank(self, block: ConvSpec, fraction: float) -> Rank:
        """The rank that TensorLy's rule gives for a fraction; our own rule where TensorLy has none."""
        return self.rank_within(block, fraction) or self.smallest_rank(block)

    @final
    def unfoldings(self, layer: ConvLayer) -> list[tuple[Tensor, ...]]:
        """For every group the kernel as matrices, one for each entry of the rank, which bounds the rank of that matrix
        when composed; none where the factorization's rank is of no matrix (CP).
        """
        return [
            tuple(self._unfoldings(layer.spec.block, part)) for part in layer.weight.detach().chunk(layer.spec.groups)
        ]

    @final
    def rejects(self, spec: ConvSpec) -> Skip | None:
        """Why this convolution cannot be factorized this way, or None."""
        reason = self._rejects(spec.block)
        return Skip(reason) if reason else None

    @final
    def max_rank(self, spec: ConvSpec) -> Rank:
        """The largest useful rank, of each group. Raises RefusedError where ``rejects`` gives a reason."""
        if refused := self.rejects(spec):
            raise RefusedError(f"{refused.reason} ({spec})")
        return self._max_rank(spec.block)

    @final
    def smallest_rank(self, spec: ConvSpec) -> Rank:
        """All ones."""
        return (1,) * len(self.max_rank(spec))

    @final
    def clip(self, spec: ConvSpec, rank: Rank) -> Rank:
        """The nearest rank below that this convolution can have."""
        lowered = tuple(min(r, most) for r, most in zip(rank, self._check_length(spec, rank), strict=True))
        return self._feasible(spec.block, lowered)

    @final
    def layout(self, spec: ConvSpec, rank: Rank) -> tuple[ConvSpec, ...]:
        """The stages' shapes. Raises RankError for a rank that this convolution cannot have."""
        self._check_rank(spec, rank)
        groups = spec.groups
        stages = [
            replace(
                stage,
                in_channels=stage.in_channels * groups,
                out_channels=stage.out_channels * groups,
                groups=stage.groups * groups,
            )
            for stage in self._stages(replace(spec.block, bias=False), rank)
        ]
        return (*stages[:-1], replace(stages[-1], bias=spec.bias))

    @final
    def decompose(
        self,
        layer: ConvLayer,
        rank: Rank,
        *,
        metric: KroneckerFisher | None = None,
        generator: torch.Generator | None = None,
    ) -> ConvChain:
        """The chain of this rank that comes nearest to ``layer`` (CP, and all in a metric but the SVDs: that is found).

        Nearest in ``metric``, else in the Frobenius norm, which is also what decides for groups whose metric says that
        nothing matters. The stages have the weight's dtype and device; half precision is decomposed in single
        precision. ``generator`` is used where the factorization begins at random. Raises RankError, RefusedError,
        WeightError, SpecError for the metric of another convolution.
        """
        return self._chain(layer, rank, metric, generator, _FITTED)

    def _chain(
        self,
        layer: ConvLayer,
        rank: Rank,
        metric: KroneckerFisher | None,
        generator: torch.Generator | None,
        iterations: int,
    ) -> ConvChain:
        specs = self.layout(layer.spec, rank)
        check_weight(layer.weight)
        if metric is not None:
            metric.check(layer.spec)
        weight = layer.weight.detach()
        weight = weight if weight.dtype == torch.float64 else weight.float()
        scale, block = pow2_scale(weight), layer.spec.block
        weight = weight if scale == 1.0 else weight / scale
        with no_reduced_precision(weight.device):
            by_group = [
                self._weights(block, part, rank, generator)
                if own is None
                else self._weights_in(block, part, rank, metric=own, random=generator, iterations=iterations)
                for part, own in _by_group(layer.spec, weight, metric)
            ]
        joined = [torch.cat(list(parts)) for parts in zip(*by_group, strict=True)]
        joined = joined if scale == 1.0 else [part * scale ** (1 / len(specs)) for part in joined]
        cast = cast_factors(joined, layer.weight.dtype)
        weights = [part.reshape(spec.weight_shape) for part, spec in zip(cast, specs, strict=True)]
        biases = [None] * (len(specs) - 1) + [layer.bias]
        return ConvChain(tuple(ConvLayer(*stage) for stage in zip(specs, weights, biases, strict=True)))

    @final
    def increases(self, layer: ConvLayer, metric: KroneckerFisher, ranks: Sequence[Rank]) -> list[float]:
        """By how much each of the ranks raises the loss, in nats: by a formula where there is one, else by a short fit,
        some per cent above what ``decompose`` will reach.
        """
        block, scale = layer.spec.block, pow2_scale(layer.weight)
        if scale != 1.0:
            even = replace(layer, weight=layer.weight / scale)
            return [nats * scale * scale for nats in self.increases(even, metric, ranks)]
        with no_reduced_precision(layer.weight.device):
            by_group = [
                None if own is None else self._increases(block, part, own)
                for part, own in _by_group(layer.spec, layer.weight.float(), metric)
            ]
        if all(known is not None for known in by_group):
            return [sum(known[rank] for known in by_group if known is not None) for rank in ranks]
        chains = (self._foreseeing(block, rank)._chain(layer, rank, metric, None, _FORESEEN) for rank in ranks)
        return [metric.loss_increase(layer.spec, compose(chain).float() - layer.weight.float()) for chain in chains]

    @final
    def bounds(self, layer: ConvLayer, ranks: Sequence[Rank]) -> list[float] | None:
        """‖W − Ŵ‖² / ‖W‖² at these ranks, or what it is at most, by singular values alone: exact for the SVDs (Eckart
        and Young 1936), for Tucker and TT the sum over the modes (De Lathauwer, De Moor and Vandewalle 2000; Oseledets
        2011). None where there is no formula.
        """
        total, lost = 0.0, [0.0] * len(ranks)
        weight = layer.weight.detach() / pow2_scale(layer.weight)
        for part in weight.float().chunk(layer.spec.groups):
            with no_reduced_precision(part.device):
                spectra = self._spectra(layer.spec.block, part)
            if not spectra:
                return None
            total += float(part.square().sum())
            tails = [spectrum.double().flip(0).cumsum(0).flip(0).tolist() for spectrum in spectra]
            for k, rank in enumerate(ranks):
                lost[k] += sum(tail[r] for tail, r in zip(tails, rank, strict=True) if r < len(tail))
        return [min(1.0, value / total) if total else 0.0 for value in lost]

    @final
    def ranks(self, spec: ConvSpec) -> tuple[Rank, ...]:
        """Every rank proportional to the largest one (entries rounded down, at least 1), ascending.

        Where the largest rank drops all stages but one, and so is the convolution itself, it is left out.
        """
        most, block = self.max_rank(spec), spec.block
        steps = sorted({(j / n, j, n) for n in set(most) for j in range(1, n + 1)})
        family = [self._feasible(block, tuple(max(1, j * m // n) for m in most)) for _, j, n in steps]
        distinct = list(dict.fromkeys(family))
        if len(distinct) > 1 and len(self.layout(spec, distinct[-1])) == 1:
            distinct.pop()
        return tuple(distinct)

    @final
    def rank_within(self, spec: ConvSpec, fraction: float) -> Rank | None:
        """The largest of ``ranks`` whose layout has at most that fraction of the parameters; None if none has."""
        ranks = self.ranks(spec)
        allowed = fraction * spec.params
        fitting = bisect.bisect_right(ranks, allowed, key=lambda rank: sum(s.params for s in self.layout(spec, rank)))
        return ranks[fitting - 1] if fitting else None

    @final
    def tensorly_rank(self, spec: ConvSpec, fraction: float) -> Rank:
        """The rank that TensorLy's rule gives for a fraction of the parameters, clipped to what is feasible."""
        self.max_rank(spec)
        return self.clip(spec, tuple(max(1, r) for r in self._tensorly_rank(spec.block, fraction)))

    @final
    def _check_length(self, spec: ConvSpec, rank: Rank) -> Rank:
        """The largest rank."""
        most = self.max_rank(spec)
        if not isinstance(rank, tuple) or len(rank) != len(most):
            raise RankError(f"{self.name} has {len(most)} ranks on {spec}, a tuple of integers, got {rank!r}")
        return most

    @final
    def _check_rank(self, spec: ConvSpec, rank: Rank) -> None:
        most = self._check_length(spec, rank)
        if min(rank) < 1 or any(r > m for r, m in zip(rank, most, strict=True)):
            raise RankError(
                f"{self.name} rank must be within {_show(self.smallest_rank(spec))} and {_show(most)} on {spec}, "
                f"got {_show(rank)}. Pass a smaller rank, or a fraction of the parameters."
            )
        if (feasible := self._feasible(spec.block, rank)) != rank:
            raise RankError(f"{self.name} ranks bound each other: {rank} can be {feasible} at most on {spec}")


def _by_group(
    spec: ConvSpec, weight: Tensor, metric: KroneckerFisher | None
) -> Iterator[tuple[Tensor, KroneckerFisher | None]]:
    """The weight and the metric of each group, None where there is none, or where it says that nothing matters."""
    for group, part in enumerate(weight.chunk(spec.groups)):
        own = None if metric is None else metric.of_group(group).like(weight)
        yield part, None if own is None or not float(own.square(spec.block, part)) > 0 else own


def check_tolerance(tolerance: object) -> None:
    """Raise ArgumentError unless it can end an iteration."""
    if not isinstance(tolerance, int | float) or not tolerance >= 0:
        raise ArgumentError(f"tolerance must be a number, at least 0, got {tolerance!r}")


def _show(rank: Rank) -> str:
    return str(rank[0]) if len(rank) == 1 else str(rank)
