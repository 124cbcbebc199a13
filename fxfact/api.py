"""What a user calls. Strings are understood here, once; below there are only objects."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import TypeVar, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fxfact.capture import Captured, ExampleInputs, How, reexport
from fxfact.capture import capture as capture_model
from fxfact.errors import ArgumentError, ArgumentTypeError
from fxfact.factorizations import Factorization, RankRequest
from fxfact.passes import (
    Applied,
    Decomposing,
    FactorizeConvs,
    Progress,
    Weights,
    applied,
    last_plan,
    record,
    swap_convs,
)
from fxfact.planning import Plan, Selection, make_plan
from fxfact.ranks import Requested
from fxfact.verification import check_rewrite

FactorizationRequest = str | Factorization | Sequence[str | Factorization]
_Factorizations = FactorizationRequest | Mapping[str, FactorizationRequest]
_Ranks = RankRequest | Mapping[str, RankRequest]
_Model = TypeVar("_Model", nn.Module, ExportedProgram)


def factorize(
    model: _Model,
    factorization: _Factorizations = "tucker",
    *,
    rank: _Ranks = 0.5,
    example_inputs: ExampleInputs | None = None,
    budget: None = None,
    calibration: None = None,
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
    executor: a ``concurrent.futures.Executor`` on which kernels are decomposed; the result is the same.
    progress: True for tqdm's bar over the kernels, or what is called as tqdm is.

    The model is not changed. Training mode, device, dtype, memory format and requires_grad carry over. Raises
    ArgumentError, ArgumentTypeError, CaptureError, RankError, WeightError: all of them FxfactError.
    """
    strategy = _strategy(factorization, rank, budget, calibration)
    decomposing = Decomposing(generator=generator, executor=executor, progress=progress)
    if verify and example_inputs is None and not isinstance(model, ExportedProgram):
        raise ArgumentError("verify=True compares outputs and needs example_inputs")
    captured = capture_model(model, example_inputs, how=capture, fold_weights=fold_weights, leaves=leaves)
    decided = make_plan(captured, strategy, include=include, exclude=exclude, allow_growth=allow_growth)
    result = _carry_out(decided, captured, decomposing)
    if verify and decided.rewrites and captured.example_inputs is not None:
        check_rewrite(model, result, captured.example_inputs)
    return cast(_Model, result)


def plan(
    model: nn.Module | ExportedProgram,
    factorization: _Factorizations = "tucker",
    *,
    rank: _Ranks = 0.5,
    example_inputs: ExampleInputs | None = None,
    budget: None = None,
    calibration: None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    allow_growth: bool = False,
    capture: How = "auto",
    fold_weights: bool = False,
    leaves: str | Sequence[str] = (),
) -> Plan:
    """Decide what every convolution becomes, without doing it. ``print`` the plan, edit it, save it, ``apply`` it.

    factorization: a name ('cp', 'cp_factorized', 'tucker', 'tt', 'spatial_svd', 'channel_svd', 'pointwise_svd'), an
        object of ``fxfact.factorizations``, a list of these (each convolution takes the first that fits), or a
        mapping from path or glob to any of them.
    rank: the largest fraction of its parameters that a convolution may keep ('same' is 1.0), an int, a tuple (Tucker:
        (r_out, r_in)), or a mapping from path or glob to any of these.
    example_inputs: a tuple is the arguments, a mapping the keyword arguments, a tensor one argument. They give the
        MACs, show which convolutions the model calls and how, and what was captured is compared with the model on
        them, in evaluation mode, without gradients, on copies. An ExportedProgram brings its own.
    include, exclude: globs on the path, or a predicate on (path, ConvSpec).
    allow_growth: also rewrite what would have more parameters or (where known) more MACs than the convolution.
    capture: 'trace', the model becomes one torch.fx graph; 'modules', it keeps its own Python and its convolution
        modules are replaced where they stand; 'export', for an ExportedProgram. 'auto' takes what reaches most.
    fold_weights: make weights that are computed from other parameters (weight_norm, spectral_norm, parametrizations,
        pruning, standardisation in a graph) parameters, with the values they have in evaluation mode.
    leaves: globs on the paths of modules that tracing keeps whole, and so leaves alone.
    budget, calibration: not in this version.
    """
    strategy = _strategy(factorization, rank, budget, calibration)
    captured = capture_model(model, example_inputs, how=capture, fold_weights=fold_weights, leaves=leaves)
    return make_plan(captured, strategy, include=include, exclude=exclude, allow_growth=allow_growth)


def apply(
    plan: Plan,
    model: _Model,
    *,
    weights: Weights = "decompose",
    generator: torch.Generator | None = None,
    executor: Executor | None = None,
    progress: Progress = False,
) -> _Model:
    """A copy of ``model`` with the plan carried out, captured in the way that the plan was made for.

    ``weights='empty'`` builds only the structure, for a state_dict to be loaded into; the other arguments are those of
    ``factorize``. Raises PlanError, naming the first differences, where the plan was made for another model;
    CaptureError, WeightError, ContractError.
    """
    decomposing = Decomposing(weights=weights, generator=generator, executor=executor, progress=progress)
    if not isinstance(plan, Plan):
        raise ArgumentTypeError(f"plan must be a fxfact.Plan, got {type(plan).__name__}. fxfact.plan makes one.")
    trusted = [decision.path for decision in plan if decision.spec is not None]
    how = cast(How, plan.capture)
    captured = capture_model(model, how=how, fold_weights=plan.fold_weights, leaves=plan.leaves, trusted=trusted)
    return cast(_Model, _carry_out(plan, captured, decomposing))


def plan_of(network: nn.Module | ExportedProgram) -> Plan:
    """The plan (the last, if there were several) that made this network. Raises PlanError where none did."""
    return last_plan(network)


@torch.inference_mode(False)  # whose parameters could never be trained
def _carry_out(plan: Plan, captured: Captured, decomposing: Decomposing) -> nn.Module | ExportedProgram:
    if captured.rung == "modules":
        return swap_convs(captured.network, {site.path: site for site in captured.sites}, plan, decomposing)
    result = FactorizeConvs(plan, decomposing=decomposing)(cast(fx.GraphModule, captured.network))
    assert result is not None
    rewritten: fx.GraphModule = result.graph_module
    if not result.modified:
        rewritten = copy.deepcopy(rewritten)
        record(rewritten, Applied(plan, {}))
    if captured.program is None:
        return rewritten
    program = reexport(captured.program, rewritten)
    record(program.graph_module, applied(rewritten)[-1])
    return program


def _strategy(factorization: object, rank: object, budget: object, calibration: object) -> Requested:
    if budget is not None or calibration is not None:
        raise ArgumentError("budget and calibration are not in this version. Pass rank=, for all or by path.")
    return Requested.parse(factorization, rank)
