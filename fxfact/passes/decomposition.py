"""The expensive part of applying a plan: every kernel is decomposed, in this process or on the caller's executor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from fxfact.calibration import Statistics
from fxfact.conv import ConvChain, ConvLayer, ConvSite, KroneckerFisher, compose, is_conv, write_chain
from fxfact.errors import ArgumentError, PlanError, error_context
from fxfact.factorizations import check_generator, weight_scale
from fxfact.planning import Decision, Plan
from fxfact.utils import (
    Progress,
    check_executor,
    check_progress,
    no_reduced_precision,
    ordered_map,
    tensor_digest,
    with_progress,
)

Weights = Literal["decompose", "empty"]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The weights of a chain's stages.

    Attributes:
        weights: the weight of each stage.
        relative_error: ‖W − Ŵ‖_F / ‖W‖_F, or None if the weights were left empty.
        quick: whether the fit ended early, so that more iterations would bring the chain closer.
    """

    weights: list[Tensor]
    relative_error: float | None
    quick: bool = False


@dataclass(frozen=True, eq=False)
class DecomposeJob:
    """A convolution to decompose.

    Attributes:
        site: the convolution.
        decision: how it is decomposed.
        seed: for random initial factors.
        start: the weights of the stages at which the fit begins.
    """

    site: ConvSite
    decision: Decision
    seed: int | None = None
    start: Sequence[Tensor] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class DecomposeOptions:
    """How chains get their weights.

    Args:
        weights: 'decompose', or 'empty' for the structure alone, into which a state_dict can be loaded.
        generator: for factorizations that start from random factors. It draws one seed for each convolution, in the
            order of the plan.
        executor: any ``concurrent.futures.Executor`` (threads, processes, a cluster). The result does not depend on it.
            Only as many jobs are submitted as it has workers, and an interrupt cancels those that have not begun.
        progress: True for a progress bar on stderr, False for none, or a callable like tqdm:
            ``progress(iterable, total=..., desc=...)``. None shows one if stderr is a terminal.

    Raises:
        ArgumentError: for another value of ``weights`` or a generator that cannot be used.
        ArgumentTypeError: for an argument of another type.
    """

    weights: Weights = "decompose"
    generator: torch.Generator | None = None
    executor: Executor | None = None
    progress: Progress = None

    def __post_init__(self) -> None:
        if self.weights not in get_args(Weights):
            raise ArgumentError(f"weights must be 'decompose' or 'empty', got {self.weights!r}")
        check_generator(self.generator)
        check_executor(self.executor)
        check_progress(self.progress)


@dataclass(frozen=True, eq=False)
class PlannedChain:
    """The modules that replace the convolution at ``path``, and the relative error of the kernel they compose to."""

    path: str
    stages: list[nn.Module]
    relative_error: float | None

    def weight_digest(self) -> str:
        """Return the digest of the stages' weights; '' if they were left empty."""
        return "" if self.relative_error is None else tensor_digest(_weights_of(self.stages))


def planned_chains(
    plan: Plan,
    sites: Mapping[str, ConvSite],
    options: DecomposeOptions,
    *,
    statistics: Statistics | None = None,
    known: Mapping[str, Decomposition] | None = None,
) -> Iterator[PlannedChain]:
    """Yield the chain of every rewrite, in the order of the plan, as soon as it is decomposed.

    Args:
        plan: the plan.
        sites: the convolutions by path. Those that share a weight share the weights of the stages, and those of a joint
            set share the parameters of its shared stages.
        options: how the chains get their weights.
        statistics: the calibration statistics, if the plan uses them.
        known: earlier results, by ``Decision.rewrite``.

    Raises:
        PlanError: if the plan needs statistics and there are none.
        WeightError, RankError, CalibrationError: from the decomposition.
    """
    needs_statistics = plan.uses_statistics and options.weights == "decompose" and bool(plan.rewrites)
    if needs_statistics and statistics is None:
        raise PlanError(
            "the plan was made with data. Pass what fxfact.calibrate returned as statistics=, or "
            "options=DecomposeOptions(weights='empty') for the structure alone."
        )
    used = statistics if needs_statistics else None
    if used is not None:
        used.check(list(sites))
    leaders = [decision for decision in plan.rewrites if sites[decision.path].tied_to is None]
    decompositions = _decompositions([(sites[d.path], d) for d in leaders], options, used, known or {})
    finished: dict[str, Decomposition] = {}
    for decision in plan.rewrites:
        site = sites[decision.path]
        if site.tied_to is None:
            finished[decision.path] = next(decompositions)
        found = finished[site.tied_to or site.path]
        weights = list(found.weights)
        for k in decision.shared_stages:  # the first layer's parameters
            weights[k] = finished[decision.shares_with or site.path].weights[k]
        stages = write_chain(decision.stages, weights, site.bias, like=site.weight)
        finished[site.path] = Decomposition(_weights_of(stages), found.relative_error)
        yield PlannedChain(site.path, stages, found.relative_error)


def _weights_of(stages: Iterable[nn.Module]) -> list[Tensor]:
    """Return the weights of a chain's convolutions. The chain may have modules for padding."""
    return [cast(Tensor, stage.weight) for stage in stages if is_conv(stage)]


def _decompositions(
    pairs: Sequence[tuple[ConvSite, Decision]],
    options: DecomposeOptions,
    statistics: Statistics | None,
    known: Mapping[str, Decomposition],
) -> Iterator[Decomposition]:
    if options.weights == "empty":
        for site, decision in pairs:
            yield Decomposition([site.weight.new_empty(stage.weight_shape) for stage in decision.stages], None)
        return
    seeds = [None if options.generator is None else _draw_seed(options.generator) for _ in pairs]
    jobs = [
        DecomposeJob(site, decision, seed)
        for (site, decision), seed in zip(pairs, seeds, strict=True)
        if decision.rewrite not in known
    ]
    new = decompose_sites(jobs, options, statistics, label="decomposing")
    for _, decision in pairs:
        yield known[decision.rewrite] if decision.rewrite in known else next(new)


def decompose_sites(
    jobs: Sequence[DecomposeJob],
    options: DecomposeOptions,
    statistics: Statistics | None,
    *,
    label: str,
    quick: bool = False,
) -> Iterator[Decomposition]:
    """Yield the decomposition of each job, in order. Large kernels go first, so that all workers finish together.

    The layers of a joint set are decomposed together: all of them must be among the jobs. ``label`` names the progress
    bar. ``quick`` fits end early: see ``Factorization.decompose``.
    """
    together: dict[str, list[int]] = {}
    for k, job in enumerate(jobs):
        together.setdefault(job.decision.shares_with or job.decision.path, []).append(k)
    by_size = sorted(together.values(), key=lambda own: sum(jobs[k].site.weight.numel() for k in own), reverse=True)
    arguments = (
        (
            [jobs[k].site.layer for k in own],
            [jobs[k].decision for k in own],
            [_fisher(jobs[k].site, statistics) for k in own],
            jobs[own[0]].seed,
            jobs[own[0]].start,
            quick,
        )
        for own in by_size
    )
    results = ordered_map(_decompose_together, arguments, options.executor)
    work = [sum(_work(jobs[k]) for k in own) for own in by_size]
    results = iter(with_progress(results, len(by_size), label, options.progress, work=work))
    finished: dict[int, Decomposition] = {}
    yielded = 0
    for own, found in zip(by_size, results, strict=True):
        finished |= zip(own, found, strict=True)
        while yielded in finished:
            yield finished.pop(yielded)
            yielded += 1


def _work(job: DecomposeJob) -> float:
    """Return about how long a decomposition takes, compared with others."""
    return float(job.site.weight.numel() * max(job.decision.rank or (1,)))


def _decompose_together(  # noqa: PLR0917 (an executor takes positional arguments)
    layers: Sequence[ConvLayer],
    decisions: Sequence[Decision],
    fishers: Sequence[KroneckerFisher | None],
    seed: int | None,
    start: Sequence[Tensor] | None,
    quick: bool,
) -> list[Decomposition]:
    """Decompose one kernel, or those of a joint set."""
    decision = decisions[0]
    if decision.shares_with is None:
        return [decompose_layer(layers[0], decision, seed, fishers[0], start, quick)]
    assert decision.factorization is not None
    assert decision.rank is not None
    with error_context(f"the joint set of {decision.path}"):
        chains = decision.factorization.decompose_jointly(layers, decision.rank, fishers)
    return [_decomposition(chain, layer.weight) for chain, layer in zip(chains, layers, strict=True)]


def _fisher(site: ConvSite, statistics: Statistics | None) -> KroneckerFisher | None:
    return None if statistics is None else statistics.fisher(site.path, site.spec)


def decompose_layer(  # noqa: PLR0917 (an executor takes positional arguments)
    layer: ConvLayer,
    decision: Decision,
    seed: int | None,
    fisher: KroneckerFisher | None,
    start: Sequence[Tensor] | None = None,
    quick: bool = False,
) -> Decomposition:
    """Decompose one kernel as decided. Takes and returns values only, so that it can run in another process."""
    assert decision.factorization is not None
    assert decision.rank is not None
    generator = None if seed is None else torch.Generator(layer.weight.device).manual_seed(seed)
    with error_context(decision.path):
        chain = decision.factorization.decompose(
            layer, decision.rank, metric=fisher, generator=generator, start=start, quick=quick
        )
    return _decomposition(chain, layer.weight, quick and fisher is not None and decision.factorization.is_fitted)


def _decomposition(chain: ConvChain, dense: Tensor, quick: bool = False) -> Decomposition:
    wide = torch.promote_types(dense.dtype, torch.float32)
    with no_reduced_precision(dense.device):
        norm, composed = _norm(dense.to(wide), dense), compose(chain).to(wide)
        composed = composed.clone() if len(chain.layers) == 1 else composed  # the weight of its only stage
        error = _norm(composed.sub_(dense.to(wide)), dense)  # in place, because it may be very large
    return Decomposition([stage.weight for stage in chain.layers], error / norm if norm else 0.0, quick)


def _norm(values: Tensor, like: Tensor) -> float:
    """Return the norm of values, as a multiple of the scale of ``like``, so that their squares do not overflow."""
    scale = weight_scale(like)
    return float((values if scale == 1 else values / scale).norm())


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
