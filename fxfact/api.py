"""What a user calls. Strings are understood here, once; below there are only objects."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import fx, nn

from fxfact.errors import ArgumentError, PlanError
from fxfact.factorizations import Factorization, RankRequest
from fxfact.graph import Captured, ExampleInputs
from fxfact.graph import capture as capture_graph
from fxfact.passes import Applied, FactorizeConvs, Weights, applied, record
from fxfact.planning import Plan, Selection, make_plan
from fxfact.ranks import Requested
from fxfact.verification import check_rewrite

FactorizationRequest = str | Factorization | Sequence[str | Factorization]
_Factorizations = FactorizationRequest | Mapping[str, FactorizationRequest]
_Ranks = RankRequest | Mapping[str, RankRequest]
Capture = Literal["auto", "trace"]


def factorize(
    model: nn.Module,
    factorization: _Factorizations = "tucker",
    *,
    rank: _Ranks = 0.5,
    example_inputs: ExampleInputs | None = None,
    budget: None = None,
    calibration: None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    allow_growth: bool = False,
    capture: Capture = "auto",
    verify: bool = False,
    generator: torch.Generator | None = None,
) -> fx.GraphModule:
    """A copy of ``model`` with its convolutions factorized: ``apply(plan(model, …), model)``.

    The arguments are those of ``plan``, and:

    verify: compare the result, on ``example_inputs`` in evaluation mode, with the model itself, its kernels replaced
        by what the chains compose to, and raise VerificationError rather than return a network whose graph is wrong.
    generator: for factorizations that begin at random (``CPMobilenet(init='random')``); no other randomness is used.

    The model is not changed. Training mode, device, dtype, memory format and requires_grad carry over. Raises
    ArgumentError, ArgumentTypeError, CaptureError, RankError, WeightError: all of them FxfactError.
    """
    strategy = _strategy(factorization, rank, budget, calibration, capture)
    if verify and example_inputs is None:
        raise ArgumentError("verify=True compares outputs and needs example_inputs")
    captured = capture_graph(model, example_inputs)
    decided = make_plan(
        captured, type(model).__name__, strategy, include=include, exclude=exclude, allow_growth=allow_growth
    )
    result = _apply(decided, captured, "decompose", generator)
    if verify and example_inputs is not None and decided.rewrites:
        check_rewrite(model, result, example_inputs)
    return result


def plan(
    model: nn.Module,
    factorization: _Factorizations = "tucker",
    *,
    rank: _Ranks = 0.5,
    example_inputs: ExampleInputs | None = None,
    budget: None = None,
    calibration: None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    allow_growth: bool = False,
    capture: Capture = "auto",
) -> Plan:
    """Decide what every convolution becomes, without doing it. ``print`` the plan, edit it, save it, ``apply`` it.

    factorization: a name ('cp', 'cp_factorized', 'tucker', 'tt', 'spatial_svd', 'channel_svd', 'pointwise_svd'), an
        object of ``fxfact.factorizations``, a list of these (each convolution takes the first that fits), or a
        mapping from path or glob to any of them.
    rank: the largest fraction of its parameters that a convolution may keep ('same' is 1.0), an int, a tuple (Tucker:
        (r_out, r_in)), or a mapping from path or glob to any of these.
    example_inputs: a tuple is the arguments, a mapping the keyword arguments, a tensor one argument. They give the
        MACs; parameters need none. Nothing is computed on them.
    include, exclude: globs on the path, or a predicate on (path, ConvSpec).
    allow_growth: also rewrite what would have more parameters or (where known) more MACs than the convolution.
    budget, calibration: not in this version.
    """
    strategy = _strategy(factorization, rank, budget, calibration, capture)
    captured = capture_graph(model, example_inputs)
    return make_plan(
        captured, type(model).__name__, strategy, include=include, exclude=exclude, allow_growth=allow_growth
    )


def apply(
    plan: Plan, model: nn.Module, *, weights: Weights = "decompose", generator: torch.Generator | None = None
) -> fx.GraphModule:
    """A copy of ``model`` with the plan carried out.

    ``weights='empty'`` builds only the structure, for a state_dict to be loaded into. Raises PlanError, naming the
    first differences, where the plan was made for another model; WeightError; ContractError.
    """
    return _apply(plan, capture_graph(model), weights, generator)


def plan_of(network: nn.Module) -> Plan:
    """The plan (the last, if there were several) that made this network. Raises PlanError where none did."""
    history = applied(network)
    if not history:
        raise PlanError(f"{type(network).__name__} was not made by a plan. fxfact.factorize returns one that was.")
    return history[-1].plan


def _apply(plan: Plan, captured: Captured, weights: Weights, generator: torch.Generator | None) -> fx.GraphModule:
    result = FactorizeConvs(plan, weights=weights, generator=generator)(captured.graph_module)
    assert result is not None
    if result.modified:
        factorized: fx.GraphModule = result.graph_module
        return factorized
    unchanged = copy.deepcopy(captured.graph_module)
    record(unchanged, Applied(plan, {}))
    return unchanged


def _strategy(factorization: object, rank: object, budget: object, calibration: object, capture: object) -> Requested:
    if budget is not None or calibration is not None:
        raise ArgumentError("budget and calibration are not in this version. Pass rank=, for all or by path.")
    if capture not in ("auto", "trace"):
        raise ArgumentError(f"capture must be 'auto' or 'trace', got {capture!r}")
    return Requested.parse(factorization, rank)
