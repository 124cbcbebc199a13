"""A plan applied to a model that keeps its own Python: each convolution module becomes a factorized module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from fxfact.calibration import Statistics
from fxfact.conv import ConvSite, FactorizedModule, factorize_module
from fxfact.passes.decomposition import DecomposeOptions, Decomposition, planned_chains
from fxfact.passes.history import PassRecord, add_record, log_pass
from fxfact.planning import Plan
from fxfact.utils import copy_with_shared


def swap_modules(
    network: nn.Module,
    sites: Mapping[str, ConvSite],
    plan: Plan,
    options: DecomposeOptions,
    *,
    statistics: Statistics | None = None,
    known: Mapping[str, Decomposition] | None = None,
    skipped: Mapping[str, str] | None = None,
) -> nn.Module:
    """Return a copy of ``network`` with a factorized module for every planned convolution.

    ``skipped`` has the reasons of convolutions that are no sites, by path.
    Raises PlanError, WeightError, RankError, CalibrationError.
    """
    plan.check_fits({path: (site.spec, site.tied_to) for path, site in sites.items()}, skipped)
    result = copy_with_shared(network, {id(sites[decision.path].weight) for decision in plan.rewrites})
    copied_sites = {path: _site_in_copy(result, site) for path, site in sites.items()}
    errors, digests = {}, {}
    for chain in planned_chains(plan, copied_sites, options, statistics=statistics, known=known):
        dense, decision = sites[chain.path].spec, plan[chain.path]
        module, shared = result.get_submodule(chain.path), decision.shared_stages
        factorize_module(module, dense, decision.stages, chain.stages, chain.path, shared=shared)
        errors[chain.path], digests[chain.path] = chain.relative_error, chain.weight_digest()
    _leave_fast_paths(result)
    add_record(result, PassRecord(plan, errors, digests))
    log_pass("swap_modules", plan, result)
    return result


def _leave_fast_paths(network: nn.Module) -> None:
    """Let PyTorch's encoder layers call their modules, and no fused operator, where linear layers were factorized.

    They would find out by themselves, but compose the weights first.
    """
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            is_factorized = any(isinstance(child, FactorizedModule) for child in module.modules())
            module.activation_relu_or_gelu = 0 if is_factorized else module.activation_relu_or_gelu


def _site_in_copy(network: nn.Module, site: ConvSite) -> ConvSite:
    parameters = network.get_submodule(site.path)._parameters
    weight = parameters["weight"]
    assert weight is not None
    return replace(site, weight=weight, bias=parameters.get("bias") if site.spec.bias else None)
