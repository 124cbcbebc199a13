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

from fxfact.calibration import MOST_SEED, Batches, Likelihood, Statistics, first_sample
from fxfact.calibration import calibrate as collect
from fxfact.capture import ExampleInputs, How
from fxfact.capture import capture as capture_model
from fxfact.choosing import Data, Selected, choose
from fxfact.errors import ArgumentError, ArgumentTypeError, CalibrationError, PlanError, whole
from fxfact.factorizations import FACTORIZATIONS, RankRequest, SpatialSVD
from fxfact.inference import never_slower
from fxfact.passes import Decomposing, Weights, carry_out, last_plan, recapture
from fxfact.planning import Plan, Selection
from fxfact.progress import Progress
from fxfact.ranks import (
    Budget,
    ByPath,
    FactorizationRequest,
    Latency,
    Loss,
    Macs,
    RankRule,
    Requested,
    WithinBudget,
    parse_several,
)
from fxfact.verification import check_rewrite

_Factorizations = FactorizationRequest | Mapping[str, FactorizationRequest]
_Rank = RankRequest | RankRule
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
    capture: How = "auto",
    fold_weights: bool = False,
    leaves: str | Sequence[str] = (),
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
    decomposing = Decomposing(generator=generator, executor=executor, progress=progress)
    strategy = _strategy(factorization, rank, budget, multiple_of, decomposing)
    example_inputs, calibration = _example(model, example_inputs, calibration)
    if verify and example_inputs is None and not isinstance(model, ExportedProgram):
        raise ArgumentError("verify=True compares outputs and needs example_inputs")
    captured = capture_model(model, example_inputs, how=capture, fold_weights=fold_weights, leaves=leaves)
    selected = Selected(include, exclude, allow_growth)
    data = Data(calibration=calibration, held_out=held_out, likelihood=likelihood, decomposing=decomposing)
    decided, statistics, decomposed = choose(captured, strategy, selected, budget, data)
    if generator is None:  # else what is random is drawn from it
        decomposing = replace(decomposing, known=decomposed)
    carried = partial(carry_out, captured=captured, decomposing=replace(decomposing, statistics=statistics))
    result = carried(decided)
    if isinstance(budget, Latency) and isinstance(result, nn.Module):
        result = never_slower(captured, decided, result, carried, budget)
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
    capture: How = "auto",
    fold_weights: bool = False,
    leaves: str | Sequence[str] = (),
    executor: Executor | None = None,
    progress: Progress = False,
) -> Plan:
    """Decide what every convolution becomes, without doing it. ``print`` the plan, edit it, save it, ``apply`` it.

    factorization: a name ('cp', 'cp_factorized', 'tucker', 'tt', 'spatial_svd', 'channel_svd', 'pointwise_svd'), an
        object of ``fxfact.factorizations``, a list of these (each convolution takes the first that fits; under a
        budget the best), or a mapping from path or glob to any of them. Default: 'tucker', under a budget all.
    rank: the largest fraction of its parameters that a convolution may keep ('same' is 1.0), an int, a tuple (Tucker:
        (r_out, r_in)), a rule (``fxfact.ranks.Energy(0.9)``, ``VBMF()``, ``LargestThatPays()``), or a mapping from path
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
    leaves: globs on the paths of modules that tracing keeps whole, and so leaves alone.
    executor: a ``concurrent.futures.Executor`` (threads, processes, a cluster's) on which a plan for a budget computes
        errors and decomposes what it measures; the plan is the same.
    progress: True for tqdm's bars, or what is called as tqdm is.

    Raises ArgumentError, ArgumentTypeError, CaptureError, RankError, WeightError, BudgetError where no network is
    within the budget, CalibrationError for what is wrong with the data, TimingError where what is to be timed fails.
    """
    decomposing = Decomposing(executor=executor, progress=progress)
    strategy = _strategy(factorization, rank, budget, multiple_of, decomposing)
    example_inputs, calibration = _example(model, example_inputs, calibration)
    captured = capture_model(model, example_inputs, how=capture, fold_weights=fold_weights, leaves=leaves)
    selected = Selected(include, exclude, allow_growth)
    data = Data(calibration=calibration, held_out=held_out, likelihood=likelihood, decomposing=decomposing)
    return choose(captured, strategy, selected, budget, data).plan


def apply(
    plan: Plan,
    model: _Model,
    *,
    weights: Weights = "decompose",
    statistics: Statistics | None = None,
    generator: torch.Generator | None = None,
    executor: Executor | None = None,
    progress: Progress = False,
) -> _Model:
    """A copy of ``model`` with the plan carried out, captured in the way that the plan was made for.

    ``weights='empty'`` builds only the structure, for a state_dict to be loaded into. A plan that was made on data
    needs their ``statistics`` again. The other arguments are those of ``factorize``. Raises PlanError, naming the first
    differences, where the plan was made for another model;
    CaptureError, WeightError, ContractError; CalibrationError for statistics of another model.
    """
    decomposing = Decomposing(
        weights=weights, generator=generator, executor=executor, progress=progress, statistics=statistics
    )
    if not isinstance(plan, Plan):
        raise ArgumentTypeError(f"plan must be a fxfact.Plan, got {type(plan).__name__}. fxfact.plan makes one.")
    if statistics is not None and not isinstance(statistics, Statistics):
        raise ArgumentTypeError(
            f"statistics must be fxfact.Statistics, got {type(statistics).__name__}. fxfact.calibrate gives them."
        )
    if statistics is not None and not plan.metric:
        raise PlanError("the plan was made without data: pass no statistics, or make it with calibration=statistics")
    return cast(_Model, carry_out(plan, recapture(model, plan), decomposing))


def calibrate(
    model: nn.Module | ExportedProgram,
    batches: Batches,
    *,
    example_inputs: ExampleInputs | None = None,
    likelihood: _Likelihood | None = None,
    seed: int = 0,
    capture: How = "auto",
    fold_weights: bool = False,
    leaves: str | Sequence[str] = (),
    progress: Progress = False,
) -> Statistics:
    """What unlabelled data say of a model's convolutions: pass it as ``calibration``, as often as you like, and as
    ``statistics`` to ``apply``; ``save`` it, ``Statistics.load`` it.

    One pass, forward and backward, in evaluation mode, on a private copy. Draws are keyed by ``seed``, 0 … 2²³ − 1, and
    the number of the sample. Where ``torch.distributed`` is initialised every process gives its own samples, and gets
    the statistics of all. The other arguments are those of ``plan``. Raises ArgumentError, CalibrationError,
    CaptureError.
    """
    if batches is None or isinstance(batches, Statistics):
        raise CalibrationError(f"batches must be an iterable of batches, got {type(batches).__name__}")
    seed = whole("seed", seed, 0, MOST_SEED)
    example_inputs, given = _example(model, example_inputs, batches)
    captured = capture_model(model, example_inputs, how=capture, fold_weights=fold_weights, leaves=leaves)
    return collect(captured, cast(Batches, given), likelihood=likelihood, seed=seed, progress=progress)


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
    factorization: object, rank: object, budget: object, multiple_of: int | None, decomposing: Decomposing
) -> Requested | WithinBudget:
    if budget is None:
        methods, ranks = "tucker" if factorization is None else factorization, 0.5 if rank is None else rank
        return Requested.parse(methods, ranks, multiple_of)
    if not isinstance(budget, Budget | Loss):
        raise ArgumentTypeError(
            f"budget must be fxfact.Macs, Params, Latency or Loss, got {budget!r}. Pass fxfact.Macs(0.5)."
        )
    if rank is not None:
        raise ArgumentError("pass rank or budget, not both: a budget chooses the ranks")
    every = [kind() for kind in FACTORIZATIONS]
    every += [SpatialSVD(last_axes_first=True)] if isinstance(budget, Latency) else []
    methods = ByPath.parse(every if factorization is None else factorization, parse_several)
    within = budget if isinstance(budget, Budget) else Macs(1.0)
    multiple = 1 if multiple_of is None else multiple_of
    return WithinBudget(
        within, methods, multiple=multiple, progress=decomposing.progress, executor=decomposing.executor
    )
