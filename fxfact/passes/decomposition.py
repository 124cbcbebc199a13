"""The long part of a plan's execution: every kernel decomposed, on one thread or on an executor of the caller's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from fxfact.calibration import Statistics
from fxfact.conv import ConvLayer, ConvSite, KroneckerFisher, compose, is_conv, write_chain
from fxfact.errors import ArgumentError, ArgumentTypeError, PlanError, error_context
from fxfact.factorizations import check_generator, pow2_scale
from fxfact.planning import Decision, Plan
from fxfact.utils import Progress, check_executor, no_reduced_precision, ordered_map, with_progress

Weights = Literal["decompose", "empty"]
Decomposed = tuple[list[Tensor], float]
Job = tuple[ConvSite, Decision, int | None]  # with a seed for what begins at random


@dataclass(frozen=True, eq=False, kw_only=True)
class DecomposeOptions:
    """How the chains get their weights.

    weights: 'decompose', or 'empty': the structure alone, for a state_dict to be loaded into.
    generator: for factorizations that begin at random; it gives every convolution a seed, in the order of the plan.
    executor: any ``concurrent.futures.Executor`` (threads, processes, a cluster's); the result is the same. No more
        kernels are on their way than it may have workers, and an interrupt cancels those that have not begun.
    progress: True for tqdm's bar, or what is called as tqdm is: ``progress(iterable, total=…, desc=…)``.
    statistics: in whose metric plans are carried out that were made in one.
    known: what ``decompose`` gave for rewrites before, by ``Decision.rewrite``.
    Raises ArgumentError, ArgumentTypeError.
    """

    weights: Weights = "decompose"
    generator: torch.Generator | None = None
    executor: Executor | None = None
    progress: Progress = False
    statistics: Statistics | None = None
    known: Mapping[str, Decomposed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weights not in get_args(Weights):
            raise ArgumentError(f"weights must be 'decompose' or 'empty', got {self.weights!r}")
        check_generator(self.generator)
        check_executor(self.executor)
        if not isinstance(self.progress, bool) and not callable(self.progress):
            raise ArgumentTypeError(f"progress must be True, False or called as tqdm is, got {self.progress!r}")

    def chains(self, plan: Plan, sites: Mapping[str, ConvSite]) -> Iterator[Chain]:
        """For every rewrite of the plan its chain, in the plan's order, as soon as it is there.

        Sites that share a weight share the stages' weights. Raises WeightError, RankError, PlanError, CalibrationError.
        """
        if plan.uses_statistics and self.statistics is None and self.weights == "decompose":
            raise PlanError("the plan was made in the metric of statistics. Pass statistics=, or weights='empty'.")
        metrics = self.statistics if plan.uses_statistics and self.weights == "decompose" else None
        if metrics is not None:
            metrics.check(list(sites))
        own = [decision for decision in plan.rewrites if sites[decision.path].tied_to is None]
        results = iter(self._weights([(sites[d.path], d) for d in own], metrics))
        made: dict[str, tuple[list[Tensor], float | None]] = {}
        for decision in plan.rewrites:
            site = sites[decision.path]
            if site.tied_to is None:
                made[decision.path] = next(results)
            weights, error = made[site.tied_to or site.path]
            stages = write_chain(decision.stages, weights, site.bias, like=site.weight)
            made[site.path] = [cast(Tensor, conv.weight) for conv in stages if is_conv(conv)], error
            yield Chain(site.path, stages, error)

    def _weights(
        self, jobs: Sequence[tuple[ConvSite, Decision]], statistics: Statistics | None
    ) -> Iterator[tuple[list[Tensor], float | None]]:
        if self.weights == "empty":
            yield from (([site.weight.new_empty(s.weight_shape) for s in d.stages], None) for site, d in jobs)
            return
        seeds = [None if self.generator is None else _seed(self.generator) for _ in jobs]
        new = [(*job, seed) for job, seed in zip(jobs, seeds, strict=True) if job[1].rewrite not in self.known]
        coming = self.decomposed(new, statistics, "decomposing")
        for _, decision in jobs:
            yield self.known[decision.rewrite] if decision.rewrite in self.known else next(coming)

    def decomposed(self, jobs: Sequence[Job], statistics: Statistics | None, doing: str) -> Iterator[Decomposed]:
        """What ``decompose`` gives for each, in their order, though the largest kernels go first: nobody is to work
        alone at the end. ``doing`` is what the bar is called.
        """
        order = sorted(range(len(jobs)), key=lambda k: jobs[k][0].weight.numel(), reverse=True)
        with_metrics = (
            (site.layer, decision, seed, statistics.metric(site.path, site.spec) if statistics else None)
            for site, decision, seed in (jobs[k] for k in order)
        )
        results = with_progress(ordered_map(decompose, with_metrics, self.executor), len(jobs), doing, self.progress)
        found: dict[int, Decomposed] = {}
        given = 0
        for k, result in zip(order, results, strict=True):
            found[k] = result
            while given in found:
                yield found.pop(given)
                given += 1


@dataclass(frozen=True, eq=False)
class Chain:
    """What stands where the convolution at ``path`` was, and its kernel's relative error, None for empty weights."""

    path: str
    stages: list[nn.Module]
    error: float | None


def decompose(layer: ConvLayer, decision: Decision, seed: int | None, metric: KroneckerFisher | None) -> Decomposed:
    """The stages' weights, and ‖W − Ŵ‖_F / ‖W‖_F. It runs anywhere, so it takes and gives values only."""
    assert decision.factorization is not None
    assert decision.rank is not None
    dense = layer.weight
    generator = None if seed is None else torch.Generator(dense.device).manual_seed(seed)
    with error_context(decision.path):
        chain = decision.factorization.decompose(layer, decision.rank, metric=metric, generator=generator)
    wide = torch.promote_types(dense.dtype, torch.float32)
    with no_reduced_precision(dense.device):
        scale = pow2_scale(dense)
        norm = float((dense.to(wide) / scale).norm())
        missed = float(((compose(chain).to(wide) - dense.to(wide)) / scale).norm())
    return [stage.weight for stage in chain.layers], missed / norm if norm else 0.0


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
