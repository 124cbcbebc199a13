"""The reference that a factorized network is compared with: the original with the composed kernels put in."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfact.conv import compose_modules, stages_in, to_torch
from fxfact.errors import PlanError
from fxfact.graph import weight_at
from fxfact.passes import (
    MergePointwise,
    OneDNN,
    PassRecord,
    PointwiseLinear,
    capture_as_planned,
    pass_history,
    run_passes,
    set_history,
)
from fxfact.planning import Decision, Plan
from fxfact.utils import alias_copy, no_reduced_precision, relative_error, tensor_digest, to_eval

_REPLACES_CONVS = {MergePointwise.name, PointwiseLinear.name, OneDNN.name}


def prepare_original(original: nn.Module | ExportedProgram, plan: Plan) -> nn.Module:
    """Copy the original and give it the plan's form, with every convolution still in place.

    Computed weights are folded and inference passes run if the plan says so.
    """
    if not (plan.fold_weights or plan.inference_passes or isinstance(original, ExportedProgram)):
        return alias_copy(original)
    pass_names = [name for name in plan.inference_passes if name not in _REPLACES_CONVS]
    return run_passes(to_eval(capture_as_planned(original, plan).network), pass_names)


def copy_as_module(network: nn.Module | ExportedProgram) -> nn.Module:
    """Copy a network. An exported program is converted to its module."""
    return alias_copy(network.module(check_guards=False) if isinstance(network, ExportedProgram) else network)


def stages_of(network: nn.Module, decision: Decision) -> list[nn.Module]:
    """Return the modules that replaced a convolution. Raises PlanError if they are not the ones that the plan made."""
    try:
        found = stages_in(network.get_submodule(decision.path))
    except AttributeError as error:
        raise PlanError(
            f"{decision.path}: the plan put a chain here, and the network has no module of this name. "
            "Pass the network that the plan made."
        ) from error
    stages = [stage for stage in found if isinstance(getattr(stage, "weight", None), Tensor)]
    planned = [(spec, torch.empty(spec.weight_shape, device="meta")) for spec in decision.stages]
    if [stage.weight.shape for stage in stages] != [to_torch(spec, weight).shape for spec, weight in planned]:
        raise PlanError(
            f"{decision.path}: the plan made {len(decision.stages)} stages here, and the network has other modules. "
            "fxfact.for_inference merges 1×1 convolutions: pass the network from before that."
        )
    return stages


def composed_kernels(network: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Compose the stages at every rewritten path into one dense kernel, in PyTorch's layout."""
    return {decision.path: _composed_kernel(network, decision) for decision in plan.rewrites}


@torch.no_grad()
def _composed_kernel(network: nn.Module, decision: Decision) -> Tensor:
    assert decision.spec is not None
    stages = stages_of(network, decision)
    with no_reduced_precision(cast(Tensor, stages[0].weight).device):
        return to_torch(decision.spec, compose_modules(decision.stages, stages))


def kernel_error(original: nn.Module, network: nn.Module, decision: Decision) -> float:
    """Return ‖Ŵ − W‖_F / ‖W‖_F of a rewritten kernel as it is now, for a prepared original. Raises PlanError."""
    weight, kernel = conv_weight(original, decision.path), _composed_kernel(network, decision)
    if weight.shape != kernel.shape:
        raise PlanError(
            f"{decision.path}: the factorized network has a kernel {tuple(kernel.shape)} here, the original has "
            f"{tuple(weight.shape)}. Pass the model that was factorized."
        )
    return relative_error(weight, kernel.to(weight.device))


def _stages_digest(network: nn.Module, decision: Decision) -> str:
    return tensor_digest(cast(Tensor, stage.weight) for stage in stages_of(network, decision))


def current_error(network: nn.Module, record: PassRecord, path: str) -> float | None:
    """Return the recorded error of a rewritten kernel; None if it is unknown or the weights changed since."""
    try:
        digest = _stages_digest(network, record.plan[path])
    except PlanError:  # the stages were merged or replaced
        return None
    return record.relative_error[path] if digest and digest == record.weight_digest.get(path) else None


def update_kernel_errors(network: nn.Module, original: nn.Module) -> None:
    """Record the errors that the kernels of the last plan have now, for a prepared original.

    Kernels that cannot be composed any more keep what was recorded.
    """
    *earlier, last = pass_history(network)
    errors, digests = dict(last.relative_error), dict(last.weight_digest)
    for decision in last.plan.rewrites:
        with suppress(PlanError):
            errors[decision.path] = kernel_error(original, network, decision)
            digests[decision.path] = _stages_digest(network, decision)
    set_history(network, (*earlier, replace(last, relative_error=errors, weight_digest=digests)))


def conv_weight(original: nn.Module, path: str) -> Tensor:
    """Return the weight of the original's convolution at a path. Raises PlanError if there is none."""
    weight = weight_at(original, path)
    if weight is None:
        raise PlanError(
            f"{path}: the factorized network has a convolution here, the original has none. "
            "Pass the model that was factorized."
        )
    return weight
