"""What a user calls. Strings are understood here, once; below there are only objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfact.analysis import check_rewrite
from fxfact.calibration import MAX_SEED, Batches, Likelihood, Statistics, collect_statistics, first_sample
from fxfact.capture import CaptureMode, ExampleInputs
from fxfact.capture import capture as capture_model
from fxfact.errors import ArgumentError, ArgumentTypeError, CalibrationError, PlanError, check_int
from fxfact.factorizations import FACTORIZATIONS, RankSpec, SpatialSVD
from fxfact.passes import DecomposeOptions, Weights, apply_plan, capture_as_planned, last_plan
from fxfact.planning import (
    Budget,
    BudgetAllocator,
    ByPath,
    FactorizationRequest,
    FixedRanks,
    Latency,
    Loss,
    Macs,
    Plan,
    RankRule,
    Selection,
    parse_factorizations,
)
from fxfact.search import CalibrationData, SearchScope, fall_back_if_slower, search
from fxfact.utils import Progress

_Factorizations = FactorizationRequest | Mapping[str, FactorizationRequest]
_Rank = RankSpec | RankRule
_Ranks = _Rank | Mapping[str, _Rank]
_Budget = Budget | Loss
_Likelihood = str | Likelihood | Callable[[Any], Tensor]
_Model = TypeVar("_Model", nn.Module, ExportedProgram)


def factorize(
    model: _Model,
    factorization: _Factorizations | None = None,
    *,
    rank: _Ranks | None = None,
    example_inputs: ExampleInputs | None = None,
    budget: _Budget | None = None,
    calibration: Batches | Statistics | None = None,
    held_out: Batches | None = None,
    likelihood: _Likelihood | None = None,
    multiple_of: int | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    allow_growth: bool = False,
    capture: CaptureMode = "auto",
    fold_weights: bool = False,
    leaf_modules: str | Sequence[str] = (),
    verify: bool = False,
    generator: torch.Generator | None = None,
    executor: Executor | None = None,
    progress: Progress = False,
) -> _Model:
    """A copy of ``model`` with its convolutions factorized: ``apply(plan(model, …), model)``.

    Out comes what suits the model: a ``torch.fx.GraphModule`` where it can be traced, else a model of its own class
    that keeps its own Python, and an ExportedProgram for an ExportedProgram (``plan_of`` tells, and why). The arguments
    are those of ``plan``, and:

    verify: compare the result, on ``example_inputs`` in evaluation mode, with the model itself, its kernels replaced
        by what the chains compose to, and raise VerificationError rather than return a network whose graph is wrong.
    generator: for factorizations that begin at random (``CPMobilenet(init='random')``); no other randomness is used.
    executor: as of ``plan``, and for the decomposition itself.

    The model is not changed. Training mode, device, dtype, memory format and requires_grad carry over. Raises what
    ``plan`` and ``apply`` raise, and VerificationError: all of them FxfactError.
    """
    decomposing = DecomposeOptions(generator=generator, executor=executor, progress=progress)
    strategy = _strategy(factorization, rank, budget, multiple_of, decomposing)
    example_inputs, calibration = _example(model, example_inputs, calibration)
    if verify and example_inputs is None and not isinstance(model, ExportedProgram):
        raise ArgumentError("verify=True compares outputs and needs example_inputs")
    captured = capture_model(model, example_inputs, how=capture, fold_weights=fold_weights, leaf_modules=leaf_modules)
    selected = SearchScope(include, exclude, allow_growth)
    data = CalibrationData(calibration=calibration, held_out=held_out, likelihood=likelihood, decomposing=decomposing)
    decided, statistics, decomposed = search(captured, strategy, selected, budget, data)
    if generator is None:  # else what is random is drawn from it
        decomposing = replace(decomposing, known=decomposed)
    carried = partial(apply_plan, captured=captured, decomposing=replace(decomposing, statistics=statistics))
    result = carried(decided)
    if isinstance(budget, Latency) and isinstance(result, nn.Module):
        result = fall_back_if_slower(captured, decided, result, carried, budget)
    if verify and decided.rewrites and captured.example_inputs is not None:
        check_rewrite(model, result, captured.example_inputs)
    return cast(_Model, result)


def plan(
    model: nn.Module | ExportedProgram,
    factorization: _Factorizations | None = None,
    *,
    rank: _Ranks | None = None,
    example_inputs: ExampleInputs | None = None,
    budget: _Budget | None = None,
    calibration: Batches | Statistics | None = None,
    held_out: Batches | None = None,
    likelihood: _Likelihood | None = None,
    multiple_of: int | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    allow_growth: bool = False,
    capture: CaptureMode = "auto",
    fold_weights: bool = False,
    leaf_modules: str | Sequence[str] = (),
    executor: Executor | None = None,
    progress: Progress = False,
) -> Plan:
    """Decide what every convolution becomes, without doing it. ``print`` the plan, edit it, save it, ``apply`` it.

    factorization: a name ('cp', 'cp_factorized', 'tucker', 'tt', 'spatial_svd', 'channel_svd', 'pointwise_svd'), an
        object of ``fxfact.factorizations``, a list of these (each convolution takes the first that fits; under a
        budget the best), or a mapping from path or glob to any of them. Default: 'tucker', under a budget all.
    rank: the largest fraction of its parameters that a convolution may keep ('same' is 1.0), an int, a tuple (Tucker:
        (r_out, r_in)), a rule (``fxfact.Energy(0.9)``, ``VBMF()``, ``LargestThatPays()``), or a mapping from path
        or glob to any of these. Default 0.5.
    budget: instead of ``rank``, ``fxfact.Macs(0.5)`` or ``fxfact.Params(0.5)``, a share of the whole network's (or
        ``at_most=`` a number), ``fxfact.Latency(0.5)``, a share of the time that the dense network takes in its fastest
        form on this machine (or ``at_most_ms=``), or ``fxfact.Loss(0.05)``, nats by which the loss may grow, as
        measured. Ranks are chosen for all convolutions together, and dense ones stay where they pay. A network for a
        time is for inference: in evaluation mode, batch norms folded.
    calibration: batches without labels (an iterable of tensors, tuples or mappings; what ``example_inputs`` lack is cut
        off), or ``Statistics`` from ``fxfact.calibrate``. Errors then count by what they do to the loss, in the choice
        of ranks and in the decomposition. Without, all relative errors count alike.
    held_out: batches on which a plan for a budget is measured (``Plan.measured``), and which are not learned from. Only
        ``Loss`` needs some, and without takes every fourth of the batches given as calibration (of two or three the
        last); beside ``Statistics`` they must be given. Of two plans for the budget, one of which spreads increases
        more evenly, it is taken where it measures better by two standard errors, on these or on every fourth batch
        learned from; with ``Statistics`` alone it is not tried.
    likelihood: what the output means: 'categorical', logits with the classes on axis 1; 'gaussian', numbers; or a
        function of the output that gives a summed loss. Default: categorical for an output (n, classes).
    multiple_of: ranks are multiples of it, or full; those asked for are rounded down, and where nothing is left of one
        the convolution stays dense. GPUs compute half precision at speed where channels are multiples of 8. Default:
        1; under a budget of milliseconds what hardware likes, 32, 16 or 8.
    example_inputs: a tuple is the arguments, a mapping the keyword arguments, a tensor one argument. They give the
        MACs, show which convolutions the model calls and how, and what was captured is compared with the model on
        them, in evaluation mode, without gradients, on copies. An ExportedProgram brings its own. Default: the first
        sample of the batches given as calibration.
    include, exclude: globs on the path, or a predicate on (path, ConvSpec).
    allow_growth: also rewrite what would have more parameters or (where known) more MACs than the convolution.
    capture: 'trace', the model becomes one torch.fx graph; 'modules', it keeps its own Python and its convolution
        modules are replaced where they stand; 'export', for an ExportedProgram. 'auto' takes what reaches most.
    fold_weights: make weights that are computed from other parameters (weight_norm, spectral_norm, parametrizations,
        pruning, standardisation in a graph) parameters, with the values they have in evaluation mode.
    leaf_modules: globs on the paths of modules that tracing keeps whole, and so leaves alone.
    executor: a ``concurrent.futures.Executor`` (threads, processes, a cluster's) on which a plan for a budget computes
        errors and decomposes what it measures; the plan is the same.
    progress: True for tqdm's bars, or what is called as tqdm is.

    Raises ArgumentError, ArgumentTypeError, CaptureError, RankError, WeightError, BudgetError where no network is
    within the budget, CalibrationError for what is wrong with the data, TimingError where what is to be timed fails.
    """
    decomposing = DecomposeOptions(executor=executor, progress=progress)
    strategy = _strategy(factorization, rank, budget, multiple_of, decomposing)
    example_inputs, calibration = _example(model, example_inputs, calibration)
    captured = capture_model(model, example_inputs, how=capture, fold_weights=fold_weights, leaf_modules=leaf_modules)
    selected = SearchScope(include, exclude, allow_growth)
    data = CalibrationData(calibration=calibration, held_out=held_out, likelihood=likelihood, decomposing=decomposing)
    return search(captured, strategy, selected, budget, data).plan


def apply(
    plan: Plan,
    model: _Model,
    *,
    weights: Weights = "decompose",
    calibration: Batches | Statistics | None = None,
    likelihood: _Likelihood | None = None,
    generator: torch.Generator | None = None,
    executor: Executor | None = None,
    progress: Progress = False,
) -> _Model:
    """Carry a plan out on a copy of the model, captured in the way that the plan was made for.

    Args:
        plan: what ``fxfact.plan`` returned, or ``Plan.load`` read.
        model: the model that the plan was made for.
        weights: ``'decompose'``, or ``'empty'`` for the structure alone, into which a state_dict can be loaded.
        calibration: the data that the plan was made with, as batches or as ``Statistics``. Needed if and only if the
            plan was made with data and ``weights='decompose'``.
        likelihood: what the outputs mean, as for ``fxfact.plan``. Only used with batches.
        generator: for factorizations that start from random factors; no other randomness is used.
        executor: a ``concurrent.futures.Executor`` that decomposes the weights.
        progress: True for tqdm's progress bars, or a callable with tqdm's signature.

    Returns:
        A new network. The model is not changed.

    Raises:
        PlanError: if the plan was made for another model; the message names the first differences.
        CalibrationError: if the data or the statistics do not fit the model.
        CaptureError, WeightError, GraphError: as for ``fxfact.factorize``.
    """
    if not isinstance(plan, Plan):
        raise ArgumentTypeError(f"plan must be a fxfact.Plan, got {type(plan).__name__}. fxfact.plan makes one.")
    if calibration is not None and not plan.uses_statistics:
        raise PlanError("the plan was made without data: pass no calibration, or make the plan with calibration=")
    decomposing = DecomposeOptions(weights=weights, generator=generator, executor=executor, progress=progress)
    captured = capture_as_planned(model, plan)
    if calibration is None or isinstance(calibration, Statistics):
        statistics = calibration
    else:
        statistics = collect_statistics(captured, calibration, likelihood=likelihood, progress=progress)
    return cast(_Model, apply_plan(plan, captured, replace(decomposing, statistics=statistics)))


def calibrate(
    model: nn.Module | ExportedProgram,
    batches: Batches,
    *,
    example_inputs: ExampleInputs | None = None,
    likelihood: _Likelihood | None = None,
    seed: int = 0,
    capture: CaptureMode = "auto",
    fold_weights: bool = False,
    leaf_modules: str | Sequence[str] = (),
    progress: Progress = False,
) -> Statistics:
    """What unlabelled data say of a model's convolutions: pass it as ``calibration``, as often as you like, and as
    ``calibration`` to ``apply``; ``save`` it, ``Statistics.load`` it.

    One pass, forward and backward, in evaluation mode, on a private copy. Draws are keyed by ``seed``, 0 … 2²³ − 1, and
    the number of the sample. Where ``torch.distributed`` is initialised every process gives its own samples, and gets
    the statistics of all. The other arguments are those of ``plan``. Raises ArgumentError, CalibrationError,
    CaptureError.
    """
    if batches is None or isinstance(batches, Statistics):
        raise CalibrationError(f"batches must be an iterable of batches, got {type(batches).__name__}")
    seed = check_int("seed", seed, 0, MAX_SEED)
    example_inputs, given = _example(model, example_inputs, batches)
    captured = capture_model(model, example_inputs, how=capture, fold_weights=fold_weights, leaf_modules=leaf_modules)
    return collect_statistics(captured, cast(Batches, given), likelihood=likelihood, seed=seed, progress=progress)


def plan_of(network: nn.Module | ExportedProgram) -> Plan:
    """The plan (the last, if there were several) that made this network. Raises PlanError where none did."""
    return last_plan(network)


def _example(
    model: nn.Module | ExportedProgram, example_inputs: ExampleInputs | None, calibration: Batches | Statistics | None
) -> tuple[ExampleInputs | None, Batches | Statistics | None]:
    """What is given, or a sample of the data; and the data. Raises CalibrationError."""
    needed = example_inputs is None and isinstance(model, nn.Module)
    if not needed or calibration is None or isinstance(calibration, Statistics):
        return example_inputs, calibration
    return first_sample(cast(nn.Module, model), calibration)


def _strategy(
    factorization: object, rank: object, budget: object, multiple_of: int | None, decomposing: DecomposeOptions
) -> FixedRanks | BudgetAllocator:
    if budget is None:
        methods, ranks = "tucker" if factorization is None else factorization, 0.5 if rank is None else rank
        return FixedRanks.parse(methods, ranks, multiple_of)
    if not isinstance(budget, Budget | Loss):
        raise ArgumentTypeError(
            f"budget must be fxfact.Macs, Params, Latency or Loss, got {budget!r}. Pass fxfact.Macs(0.5)."
        )
    if rank is not None:
        raise ArgumentError("pass rank or budget, not both: a budget chooses the ranks")
    every = [kind() for kind in FACTORIZATIONS]
    every += [SpatialSVD(last_axes_first=True)] if isinstance(budget, Latency) else []
    methods = ByPath.parse(every if factorization is None else factorization, parse_factorizations)
    within = budget if isinstance(budget, Budget) else Macs(1.0)
    multiple = 1 if multiple_of is None else multiple_of
    return BudgetAllocator(
        within, methods, multiple=multiple, progress=decomposing.progress, executor=decomposing.executor
    )
