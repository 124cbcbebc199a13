"""Applies a plan to a captured network, in the way that suits how it was captured."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fxfact.calibration import Statistics
from fxfact.capture import Captured, CaptureMode, ExampleInputs, capture, reexport
from fxfact.conv import Skip
from fxfact.errors import PlanError
from fxfact.passes.decomposition import DecomposeOptions, Decomposition
from fxfact.passes.factorize_convs import FactorizeConvs
from fxfact.passes.history import PassRecord, add_record, pass_history, set_history
from fxfact.passes.inference_passes import run_passes
from fxfact.passes.swap_modules import swap_modules
from fxfact.planning import Plan
from fxfact.utils import to_eval


def capture_as_planned(
    model: nn.Module | ExportedProgram, plan: Plan, example_inputs: ExampleInputs | None = None
) -> Captured:
    """Capture the model in the way that the plan was made for. Raises ArgumentError, CaptureError, PlanError."""
    if plan.capture == "export" and isinstance(model, nn.Module):
        raise PlanError(
            "the plan was made for an ExportedProgram. Pass torch.export.export(model, args), or make a plan of the "
            "module."
        )
    return capture(
        model,
        example_inputs,
        how="auto" if isinstance(model, ExportedProgram) else cast(CaptureMode, plan.capture),
        fold_weights=plan.fold_weights,
        leaf_modules=plan.leaf_modules,
        trusted={decision.path: decision.spec for decision in plan if decision.spec is not None},
    )


@torch.inference_mode(False)  # parameters made in inference mode could never be trained
def apply_plan(
    plan: Plan,
    captured: Captured,
    options: DecomposeOptions,
    *,
    statistics: Statistics | None = None,
    known: Mapping[str, Decomposition] | None = None,
) -> nn.Module | ExportedProgram:
    """Apply a plan to a captured network, which is not changed.

    Args:
        plan: the plan.
        captured: the network that it was made for.
        options: how the chains get their weights.
        statistics: the calibration statistics that the plan was made with, if any.
        known: earlier decompositions, by ``Decision.rewrite``.

    Returns:
        A graph module, a model of the original class, or an exported program, as the network was captured.

    Raises:
        PlanError, WeightError, RankError, CalibrationError, GraphError: see ``FactorizeConvs``.
    """
    plan = replace(plan, capture=captured.frontend)  # a plan for a program's module may be applied to the program
    if captured.frontend == "modules":
        sites = {site.path: site for site in captured.sites}
        skipped = {item.subject: item.reason for item in captured.found if isinstance(item, Skip)}
        swapped = swap_modules(
            captured.network, sites, plan, options, statistics=statistics, known=known, skipped=skipped
        )
        return run_passes(to_eval(swapped), plan.inference_passes) if plan.inference_passes else swapped
    factorize_convs = FactorizeConvs(plan, options=options, statistics=statistics, known=known)
    result = factorize_convs(cast(fx.GraphModule, captured.network))
    assert result is not None
    network: fx.GraphModule = result.graph_module
    if not result.modified:
        network = copy.deepcopy(network)
        add_record(network, PassRecord(plan, {}))
    if plan.inference_passes:
        network = cast(fx.GraphModule, run_passes(to_eval(network), plan.inference_passes))
    if captured.program is None:
        return network
    program = reexport(captured.program, network)
    set_history(program.graph_module, pass_history(network))
    return program
