"""What a user calls. Strings are parsed here, once; the rooms below only take objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfact.analysis import check_rewrite
from fxfact.calibration import (
    MAX_SAMPLES,
    MAX_SEED,
    Batches,
    Likelihood,
    Statistics,
    Transform,
    collect_statistics,
    with_batch_options,
    with_example,
)
from fxfact.capture import Captured, CaptureMode, ExampleInputs
from fxfact.capture import capture as capture_model
from fxfact.errors import ArgumentError, ArgumentTypeError, CalibrationError, PlanError, check_int
from fxfact.factorizations import FACTORIZATIONS, RankSpec, SpatialSVD
from fxfact.passes import DecomposeOptions, Weights, apply_plan, capture_as_planned, last_plan
from fxfact.planning import (
    KINDS,
    Budget,
    BudgetAllocator,
    ByPath,
    ErrorCurveCache,
    FactorizationRequest,
    FixedRanks,
    Joint,
    Kinds,
    Latency,
    Loss,
    Macs,
    Metric,
    Plan,
    RankRule,
    SearchScope,
    Selection,
    describe_call,
    parse_factorizations,
    summarize_reasons,
    warn_without_data,
)
from fxfact.search import CalibrationData, SearchResult, fall_back_if_slower, search, warn_if_slower
from fxfact.utils import Progress, warn_caller, with_phase

_Factorizations = FactorizationRequest | Mapping[str, FactorizationRequest]
_Ranks = RankSpec | RankRule | Mapping[str, RankSpec | RankRule]
_Budget = Budget | Loss | Metric
_Likelihood = (
    str
    | Likelihood
    | Mapping[str, str | None]
    | Sequence[str | None]
    | Callable[[Any], Tensor]
    | Callable[[Any, Any], Tensor]
)
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
    transform: Transform | None = None,
    max_samples: int | None = MAX_SAMPLES,
    multiple_of: int | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    kinds: Kinds = KINDS,
    joint: Joint = (),
    allow_growth: bool = False,
    capture: CaptureMode = "auto",
    fold_weights: bool = False,
    leaf_modules: str | Sequence[str] = (),
    error_curves: ErrorCurveCache | None = None,
    verify: bool = False,
    generator: torch.Generator | None = None,
    executor: Executor | None = None,
    progress: Progress = None,
) -> _Model:
    """Factorize the convolutions and linear layers of a model: ``apply(plan(model, ...), model)`` in one call.

    Args:
        model: a network, or an ExportedProgram. It is not changed.
        factorization: see ``plan``.
        rank: see ``plan``.
        example_inputs: see ``plan``.
        budget: see ``plan``.
        calibration: see ``plan``.
        held_out: see ``plan``.
        likelihood: see ``plan``.
        transform: see ``plan``.
        max_samples: see ``plan``.
        multiple_of: see ``plan``.
        include: see ``plan``.
        exclude: see ``plan``.
        kinds: see ``plan``.
        joint: see ``plan``.
        allow_growth: see ``plan``.
        capture: see ``plan``.
        fold_weights: see ``plan``.
        leaf_modules: see ``plan``.
        error_curves: see ``plan``.
        verify: compare the result, on ``example_inputs`` in evaluation mode, with the model whose kernels are replaced
            by the composed kernels of the chains. A wrong graph raises VerificationError.
        generator: for factorizations that start from random factors (``CPMobilenet(init='random')``). No other
            randomness is used.
        executor: see ``plan``. It also decomposes the kernels.
        progress: see ``plan``.

    Returns:
        A new network: a ``torch.fx.GraphModule``, or a model of its own class, whose Python code still runs (see
        ``capture``); an ExportedProgram for an ExportedProgram. ``plan_of`` tells which, and why. Training
        mode, device, dtype, memory format and requires_grad carry over. A warning says so, with the reasons, if no
        layer is rewritten; if ranks were chosen without data (``fxfact.AccuracyWarning``); and if the result measures
        slower than the model on ``example_inputs`` (``fxfact.SpeedWarning``).

    Raises:
        FxfactError: what ``plan`` and ``apply`` raise, and VerificationError.
    """
    arguments = locals()  # first, while these are the arguments
    options = DecomposeOptions(generator=generator, executor=executor, progress=progress)
    has_example = example_inputs is not None or not isinstance(calibration, Statistics | None)
    if verify and not has_example and not isinstance(model, ExportedProgram):
        raise ArgumentError("verify=True compares outputs and needs example_inputs")
    captured, found, batch = _find_plan(arguments, options)
    known = found.decompositions if generator is None else {}  # the caller's generator draws new random factors
    apply_to = partial(apply_plan, captured=captured, options=options, statistics=found.statistics, known=known)
    result = apply_to(found.plan)
    if found.refit is not None and found.plan.rewrites:
        result = found.refit(cast(nn.Module, result))
    if isinstance(result, nn.Module):
        if isinstance(cost := _cost_budget(budget), Latency):
            result = fall_back_if_slower(captured, found.plan, result, apply_to, cost)
        else:
            warn_if_slower(captured, result, batch)
    if verify and found.plan.rewrites and captured.example_inputs is not None:
        with_phase(partial(check_rewrite, model, result, captured.example_inputs), "checking", progress)
    _warn_if_unchanged(last_plan(result), "factorize")
    warn_without_data(found.plan, "factorize")
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
    transform: Transform | None = None,
    max_samples: int | None = MAX_SAMPLES,
    multiple_of: int | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    kinds: Kinds = KINDS,
    joint: Joint = (),
    allow_growth: bool = False,
    capture: CaptureMode = "auto",
    fold_weights: bool = False,
    leaf_modules: str | Sequence[str] = (),
    error_curves: ErrorCurveCache | None = None,
    executor: Executor | None = None,
    progress: Progress = None,
) -> Plan:
    """Choose a factorization and a rank for every convolution and linear layer.

    Print, edit or save the plan, then ``apply`` it.

    Args:
        model: a network, or an ExportedProgram. It is not changed.
        factorization: a name ('cp', 'cp_factorized', 'tucker', 'tt', 'spatial_svd', 'channel_svd', 'svd'), an
            object of ``fxfact.factorizations``, a list of these, or a mapping from path or glob to any of them. Of a
            list, each layer takes the first that applies; under a budget, the best. Default: 'tucker'; under a
            budget, all.
        rank: the largest fraction of its parameters that a layer may keep ('same' is 1.0), an int, a tuple (for
            Tucker (r_out, r_in)), a rule of ``fxfact.ranks`` (``Energy(0.9)``, ``VBMF()``, ``LargestThatPays()``), or a
            mapping from path or glob to any of these. Default: 0.5 if there is neither a budget nor data.
        example_inputs: a tuple is the arguments, a mapping the keyword arguments, a tensor one argument. They give the
            MACs and show which layers the model calls. The captured network is compared with the model on them,
            in evaluation mode, without gradients, on copies. Default: what an ExportedProgram was exported with, or the
            first sample of the calibration batches.
        budget: a bound on the cost of the network, instead of ``rank``: ``fxfact.Macs(0.5)`` or ``fxfact.Params(0.5)``,
            a share of the whole network's (or ``at_most=`` a number); ``fxfact.Latency(0.5)``, a share of the time of
            the dense network in its fastest exact variant on this machine (or ``at_most_ms=``), which is
            ``fxfact.Speedup(2)``; ``fxfact.Loss(0.05)``, nats by which the loss may increase, as measured; or
            ``fxfact.Metric(evaluate, at_most_drop=0.5)``, a bound on your own metric. Ranks are chosen for all layers
            together, and layers stay dense if that is better. The result of a budget of milliseconds
            is for inference only: it is in evaluation mode, with batch norms folded. Default: ``fxfact.Macs(0.5)`` if
            ``calibration`` is given and ``rank`` is not.
        calibration: unlabelled batches (an iterable of tensors, tuples or mappings; elements that the example inputs do
            not have are cut off), or the ``Statistics`` that ``fxfact.calibrate`` returned. Errors are then weighed by
            their effect on the loss, in the choice of ranks and in the decomposition. Without data, the relative
            errors of all layers count equally.
        held_out: batches to measure the plan on (``Plan.measured_loss_increase``). They are not learned from. A
            ``Loss`` budget needs such batches. By default it holds out every fourth batch of ``calibration``
            (of two or three, the last one). If ``calibration`` is ``Statistics``, you must pass them. For every budget
            a second plan, which spreads loss increases more evenly, is taken if it measures better by two standard
            errors on these batches, or on every fourth batch learned from. With ``Statistics`` alone it is not tried.
        likelihood: what the outputs mean, if the values do not show it (the plan prints how they were read): the name
            of a distribution for all outputs, 'categorical' (logits, probabilities or log-probabilities of classes),
            'bernoulli' (independent probabilities) or 'gaussian' (numbers); a mapping from the names of outputs to
            these, with None for an output that is left out, or a sequence in the order of the outputs; a
            differentiable function ``divergence(expected, found)`` that returns one number for each sample; an object
            with the methods of ``fxfact.Likelihood``; or a function that maps the output to a scalar loss, which gives
            gradients but cannot measure.
        transform: a function that makes of each batch what the model is called with: a tensor, a tuple of positional
            arguments or a mapping of keyword arguments. It is called on the batches of ``calibration`` and
            ``held_out``. Default: the batches are used as they are.
        max_samples: how many samples to take of ``calibration``, and of ``held_out``, at most: 1,024 by default, None
            for all. The last batch is cut along the first axis; no more batches are read, so the loader may be endless.
        multiple_of: ranks are multiples of this, or full. Requested ranks are rounded down; a layer whose rank
            would become 0 stays dense. GPUs compute half precision fast if channels are multiples of 8. Default: 1;
            under a budget of milliseconds 32, 16 or 8.
        include: globs on the path, or a predicate on (path, ConvSpec). Default: every layer.
        exclude: the same, for layers to leave alone.
        kinds: the kinds of layers to consider: 'conv', 'linear' or both.
        joint: globs on the path, such as ``["layer3.*conv2"]``, each for a set of layers with weights of one shape, no
            groups, and not transposed. The chains of a set may share parameters: the pointwise stages of Tucker, the
            first stage of an SVD. Under a budget that counts parameters, a set does so if less loss is predicted than
            for chains of their own. With ``rank``, it does so if all its layers get one factorization and rank that
            allow it. Sharing saves parameters only, so it is refused for a budget of milliseconds, and chosen for none
            of MACs.
        allow_growth: also rewrite layers that would have more parameters or (if known) more MACs.
        capture: 'trace' makes the model one torch.fx graph; 'modules' keeps the model's own class and Python and
            replaces its modules of convolutions and linear layers; 'export' is for an ExportedProgram. 'auto' takes the
            one that reaches most layers. If both reach as many, it takes 'modules' for a class with public methods or
            properties that a graph would lose (``fuse``, ``training_step``), except under a budget of milliseconds,
            and 'trace' for other models.
        fold_weights: make weights that are computed from other parameters (weight_norm, spectral_norm,
            parametrizations, pruning, standardisation in a graph) parameters with their values in evaluation mode.
        leaf_modules: globs on the paths of modules that tracing does not look into. A graph keeps their layers
            dense.
        error_curves: a cache of error curves, which makes further plans for the same weights and statistics fast.
        executor: a ``concurrent.futures.Executor`` (threads, processes, a cluster) that computes errors and decomposes
            kernels that are measured. The plan does not depend on it.
        progress: True for progress bars on stderr, False for none, or a callable with tqdm's signature. None shows
            bars if stderr is a terminal.

    Returns:
        The plan.

    Raises:
        ArgumentError, ArgumentTypeError: for arguments out of range, of another type, or that cannot work together.
        CaptureError: if the model cannot be captured.
        RankError, WeightError: if a rank is not feasible, or a weight is not finite.
        BudgetError: if no network meets the budget.
        CalibrationError: if something is wrong with the data.
        MetricError: if your own metric cannot be measured.
        TimingError: if the network does not run while it is timed.
    """
    arguments = locals()  # first, while these are the arguments
    _, found, _ = _find_plan(arguments, DecomposeOptions(executor=executor, progress=progress))
    warn_without_data(found.plan, "plan")
    return found.plan


def apply(
    plan: Plan,
    model: _Model,
    *,
    weights: Weights = "decompose",
    calibration: Batches | Statistics | None = None,
    likelihood: _Likelihood | None = None,
    transform: Transform | None = None,
    max_samples: int | None = MAX_SAMPLES,
    example_inputs: ExampleInputs | None = None,
    generator: torch.Generator | None = None,
    executor: Executor | None = None,
    progress: Progress = None,
) -> _Model:
    """Apply a plan to a copy of the model, captured in the way that the plan was made for.

    Args:
        plan: a plan from ``fxfact.plan`` or ``Plan.load``.
        model: the model that the plan was made for. It is not changed.
        weights: 'decompose', or 'empty' for the structure alone, into which a state_dict can be loaded.
        calibration: the data that the plan was made with, as batches or as ``Statistics``. Only for plans that were
            made with data, which need it unless ``weights='empty'``.
        likelihood: what the outputs mean, as for ``plan``. Only for batches.
        transform: makes of each batch what the model is called with, as for ``plan``. Only for batches.
        max_samples: how many samples to take at most, as for ``plan``. Only for batches.
        example_inputs: the example inputs of the plan. Batches are cut to their arguments, by default to those that
            ``forward()`` requires. The captured network is compared with the model on them.
        generator: for factorizations that start from random factors. No other randomness is used.
        executor: a ``concurrent.futures.Executor`` that decomposes the kernels.
        progress: True for progress bars on stderr, False for none, or a callable with tqdm's signature. None shows
            bars if stderr is a terminal.

    Returns:
        A new network, as for ``factorize``. A warning says so if the plan rewrites no layer.

    Raises:
        PlanError: if the plan was made for another model; the message names the first differences.
        CalibrationError: if the data or the statistics do not fit the model.
        CaptureError, WeightError, GraphError: if the model cannot be captured or rewritten.
    """
    options = DecomposeOptions(weights=weights, generator=generator, executor=executor, progress=progress)
    if not isinstance(plan, Plan):
        raise ArgumentTypeError(f"plan must be a fxfact.Plan, got {type(plan).__name__}. fxfact.plan makes one.")
    if calibration is not None and not plan.uses_statistics:
        raise PlanError("the plan was made without data: pass no calibration, or make the plan with calibration=")
    if calibration is None and plan.uses_statistics and plan.rewrites and options.weights == "decompose":
        raise PlanError("the plan was made with data. Pass them as calibration=, or pass weights='empty'.")
    (calibration,) = with_batch_options(transform, max_samples, calibration=calibration)
    has_batches = calibration is not None and not isinstance(calibration, Statistics)
    if likelihood is not None and not has_batches:
        raise ArgumentError("likelihood is only used with batches. Remove it, or pass batches as calibration.")
    captured = capture_as_planned(model, plan, example_inputs)
    if calibration is None or isinstance(calibration, Statistics):
        statistics = calibration
    elif weights == "empty":
        statistics = None
    else:
        statistics = collect_statistics(captured, calibration, likelihood=likelihood, progress=progress)
    result = apply_plan(plan, captured, options, statistics=statistics)
    if weights == "decompose":
        _warn_if_unchanged(plan, "apply")
    return cast(_Model, result)


def calibrate(
    model: nn.Module | ExportedProgram,
    batches: Batches,
    *,
    example_inputs: ExampleInputs | None = None,
    likelihood: _Likelihood | None = None,
    transform: Transform | None = None,
    max_samples: int | None = MAX_SAMPLES,
    seed: int = 0,
    capture: CaptureMode = "auto",
    fold_weights: bool = False,
    leaf_modules: str | Sequence[str] = (),
    progress: Progress = None,
) -> Statistics:
    """Learn from unlabelled data which errors of each layer the loss can bear.

    This is one pass over the data, forward and backward, in evaluation mode, on a private copy of the model. It
    estimates the Kronecker-factored Fisher information of every layer (K-FAC: Martens and Grosse 2015; Grosse and
    Martens 2016). If ``torch.distributed`` is initialised, every process gives its own samples and gets the statistics
    of all.

    Args:
        model: a network, or an ExportedProgram. It is not changed.
        batches: an iterable of unlabelled batches, as for ``plan``.
        example_inputs: see ``plan``.
        likelihood: see ``plan``.
        transform: see ``plan``.
        max_samples: see ``plan``.
        seed: 0 ... 2²³ − 1. Random draws depend on it and on the number of the sample only.
        capture: see ``plan``.
        fold_weights: see ``plan``.
        leaf_modules: see ``plan``.
        progress: see ``plan``.

    Returns:
        Statistics to pass as ``calibration``, as often as you like.

    Raises:
        ArgumentError: for arguments out of range.
        CalibrationError: if something is wrong with the data.
        CaptureError: if the model cannot be captured.
    """
    if batches is None or isinstance(batches, Statistics):
        raise CalibrationError(f"batches must be an iterable of batches, got {type(batches).__name__}")
    seed = check_int("seed", seed, 0, MAX_SEED)
    (given,) = with_batch_options(transform, max_samples, batches=batches)
    example_inputs, _, given = with_example(model, example_inputs, given)
    captured = capture_model(model, example_inputs, how=capture, fold_weights=fold_weights, leaf_modules=leaf_modules)
    return collect_statistics(captured, cast(Batches, given), likelihood=likelihood, seed=seed, progress=progress)


def plan_of(network: nn.Module | ExportedProgram) -> Plan:
    """Return the plan that made a network; if several were applied, the last one.

    Args:
        network: a network that ``factorize`` or ``apply`` returned, or a copy of it.

    Returns:
        The plan, with the figures that were known when it was made. ``inspect`` and ``report`` have those of today.

    Raises:
        PlanError: if the network was not made by a plan.
    """
    return last_plan(network)


def _warn_if_unchanged(plan: Plan, caller: str) -> None:
    """Warn if a plan rewrites nothing, with its most frequent reasons."""
    if plan.rewrites:
        return
    if not len(plan):
        warn_caller(f"{caller} rewrote nothing: no convolution and no linear layer was found in {plan.model}")
        return
    warn_caller(
        f"{caller} rewrote none of the {len(plan)} layers of {plan.model}: {summarize_reasons(plan)}. "
        "Print the plan to see the reason of each."
    )


def _find_plan(
    arguments: Mapping[str, Any], options: DecomposeOptions
) -> tuple[Captured, SearchResult, ExampleInputs | None]:
    """Capture the model and find the plan, for the arguments of ``plan`` by name.

    The last value is the first batch of the data, if the example inputs are its first sample.
    """
    given = SimpleNamespace(**arguments)
    budget = _default_budget(given.budget, given.rank, given.calibration)
    strategy = _parse_strategy(
        given.factorization, given.rank, budget, given.multiple_of, error_curves=given.error_curves, options=options
    )
    calibration, held_out = with_batch_options(
        given.transform, given.max_samples, calibration=given.calibration, held_out=given.held_out
    )
    example_inputs, batch, calibration = with_example(given.model, given.example_inputs, calibration)
    capturing = partial(
        capture_model,
        given.model,
        example_inputs,
        how=given.capture,
        keep_members=not isinstance(_cost_budget(budget), Latency),  # batch norms can only be folded in a graph
        fold_weights=given.fold_weights,
        leaf_modules=given.leaf_modules,
    )
    captured = with_phase(capturing, "capturing", options.progress)
    limits = {name: arguments[name] for name in ("include", "exclude", "kinds", "joint", "allow_growth")}
    scope = SearchScope(**limits, call=describe_call(plan, arguments))
    data = CalibrationData(calibration=calibration, held_out=held_out, likelihood=given.likelihood)
    bound = budget if isinstance(budget, Loss | Metric) else None
    return captured, search(captured, strategy, scope, data, options=options, bound=bound), batch


def _default_budget(budget: _Budget | None, rank: object, calibration: object) -> _Budget | None:
    """Return the budget; with data and without ranks, half of the MACs by default."""
    return Macs(0.5) if budget is None and rank is None and calibration is not None else budget


def _parse_strategy(
    factorization: object,
    rank: object,
    budget: object,
    multiple_of: int | None,
    *,
    error_curves: ErrorCurveCache | None,
    options: DecomposeOptions,
) -> FixedRanks | BudgetAllocator:
    if error_curves is not None and not isinstance(error_curves, ErrorCurveCache):
        raise ArgumentTypeError(f"error_curves must be a fxfact.ErrorCurveCache, got {type(error_curves).__name__}")
    if budget is None:
        requested = "tucker" if factorization is None else factorization
        return FixedRanks.parse(requested, 0.5 if rank is None else rank, multiple_of)
    cost = _cost_budget(budget)
    if cost is None:
        raise ArgumentTypeError(
            f"budget must be fxfact.Macs(0.5), or a Params, Latency, Speedup, Loss or Metric, got {budget!r}"
        )
    if rank is not None:
        raise ArgumentError("pass rank or budget, not both: a budget chooses the ranks")
    if factorization is None:
        every = [kind() for kind in FACTORIZATIONS]
        every += [SpatialSVD(last_axes_first=True)] if isinstance(cost, Latency) else []
        factorizations = ByPath(tuple(every), {})
    else:
        factorizations = ByPath.parse(factorization, parse_factorizations)
    return BudgetAllocator(
        budget=cost,
        factorizations=factorizations,
        multiple=1 if multiple_of is None else multiple_of,
        error_curves=ErrorCurveCache() if error_curves is None else error_curves,
        progress=options.progress,
        executor=options.executor,
    )


def _cost_budget(budget: object) -> Budget | None:
    """Return the budget that says in which unit the cost is counted, or None if this is no budget."""
    if isinstance(budget, Loss):
        return Macs(1.0)
    if isinstance(budget, Metric):
        return budget.minimise(1.0)
    return budget if isinstance(budget, Budget) else None
