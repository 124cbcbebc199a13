"""A plan carried out on what was captured, in the way that suits it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fxfact.capture import Captured, CaptureMode, ExampleInputs, capture, reexport
from fxfact.passes.decomposition import DecomposeOptions
from fxfact.passes.factorize_convs import FactorizeConvs
from fxfact.passes.history import PassRecord, add_record, pass_history, set_history
from fxfact.passes.inference_passes import run_passes
from fxfact.passes.swap_modules import swap_modules
from fxfact.planning import Plan
from fxfact.utils import to_eval


def capture_as_planned(
    model: nn.Module | ExportedProgram, plan: Plan, example_inputs: ExampleInputs | None = None
) -> Captured:
    """The model, captured in the way that the plan was made for. Raises ArgumentError, CaptureError."""
    how = "auto" if isinstance(model, ExportedProgram) else cast(CaptureMode, plan.capture)
    trusted = [decision.path for decision in plan if decision.spec is not None]
    return capture(
        model, example_inputs, how=how, fold_weights=plan.fold_weights, leaf_modules=plan.leaf_modules, trusted=trusted
    )


@torch.inference_mode(False)  # whose parameters could never be trained
def apply_plan(plan: Plan, captured: Captured, decomposing: DecomposeOptions) -> nn.Module | ExportedProgram:
    """A graph module, a model that keeps its own Python, or an exported program. Raises PlanError, WeightError,
    GraphError.
    """
    plan = replace(plan, capture=captured.frontend)  # a program may be given a plan that was made for its module
    if captured.frontend == "modules":
        swapped = swap_modules(captured.network, {site.path: site for site in captured.sites}, plan, decomposing)
        return run_passes(to_eval(swapped), plan.inference_passes) if plan.inference_passes else swapped
    result = FactorizeConvs(plan, decomposing=decomposing)(cast(fx.GraphModule, captured.network))
    assert result is not None
    rewritten: fx.GraphModule = result.graph_module
    if not result.modified:
        rewritten = copy.deepcopy(rewritten)
        add_record(rewritten, PassRecord(plan, {}))
    if plan.inference_passes:
        rewritten = cast(fx.GraphModule, run_passes(to_eval(rewritten), plan.inference_passes))
    if captured.program is None:
        return rewritten
    program = reexport(captured.program, rewritten)
    set_history(program.graph_module, pass_history(rewritten))
    return program
