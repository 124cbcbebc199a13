"""A plan carried out on a model that keeps its own Python: its convolutions become stand-ins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from fxfact.conv import ConvSite, factorize_module
from fxfact.passes.decomposition import DecomposeOptions
from fxfact.passes.history import PassRecord, add_record, log_pass
from fxfact.planning import Plan
from fxfact.utils import copy_with_shared


def swap_modules(
    network: nn.Module, sites: Mapping[str, ConvSite], plan: Plan, decomposing: DecomposeOptions
) -> nn.Module:
    """A copy of ``network`` with a stand-in for every planned convolution. Raises PlanError, WeightError, RankError."""
    plan.check_fits({path: (site.spec, site.tied_to) for path, site in sites.items()})
    result = copy_with_shared(network, {id(sites[decision.path].weight) for decision in plan.rewrites})
    theirs = {path: _in(result, site) for path, site in sites.items()}
    errors = {}
    for chain in decomposing.chains(plan, theirs):
        spec, specs = sites[chain.path].spec, plan[chain.path].stages
        factorize_module(result.get_submodule(chain.path), spec, specs, chain.stages)
        errors[chain.path] = chain.error
    add_record(result, PassRecord(plan, errors))
    log_pass("swap_convs", plan, result)
    return result


def _in(network: nn.Module, site: ConvSite) -> ConvSite:
    """The same site in a copy of the network."""
    held = network.get_submodule(site.path)._parameters
    weight = held["weight"]
    assert weight is not None
    return replace(site, weight=weight, bias=held.get("bias"))
