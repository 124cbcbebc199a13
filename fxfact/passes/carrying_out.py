"""A plan carried out on what was captured, in the way that suits it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fxfact.capture import Captured, ExampleInputs, How, capture, reexport
from fxfact.copying import evaluated
from fxfact.passes.base import Applied, applied, record, record_all
from fxfact.passes.decomposing import Decomposing
from fxfact.passes.factorize_convs import FactorizeConvs
from fxfact.passes.for_inference import in_form
from fxfact.passes.swap_convs import swap_convs
from fxfact.planning import Plan


def recapture(model: nn.Module | ExportedProgram, plan: Plan, example_inputs: ExampleInputs | None = None) -> Captured:
    """The model, captured in the way that the plan was made for. Raises ArgumentError, CaptureError."""
    how = "auto" if isinstance(model, ExportedProgram) else cast(How, plan.capture)
    trusted = [decision.path for decision in plan if decision.spec is not None]
    return capture(model, example_inputs, how=how, fold_weights=plan.fold_weights, leaves=plan.leaves, trusted=trusted)


@torch.inference_mode(False)  # whose parameters could never be trained
def carry_out(plan: Plan, captured: Captured, decomposing: Decomposing) -> nn.Module | ExportedProgram:
    """A graph module, a model that keeps its own Python, or an exported program. Raises PlanError, WeightError,
    ContractError.
    """
    plan = replace(plan, capture=captured.rung)  # a program may be given a plan that was made for its module
    if captured.rung == "modules":
        swapped = swap_convs(captured.network, {site.path: site for site in captured.sites}, plan, decomposing)
        return in_form(evaluated(swapped), plan.form) if plan.form else swapped
    result = FactorizeConvs(plan, decomposing=decomposing)(cast(fx.GraphModule, captured.network))
    assert result is not None
    rewritten: fx.GraphModule = result.graph_module
    if not result.modified:
        rewritten = copy.deepcopy(rewritten)
        record(rewritten, Applied(plan, {}))
    if plan.form:
        rewritten = cast(fx.GraphModule, in_form(evaluated(rewritten), plan.form))
    if captured.program is None:
        return rewritten
    program = reexport(captured.program, rewritten)
    record_all(program.graph_module, applied(rewritten))
    return program
