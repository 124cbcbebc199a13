"""A plan carried out on a model that keeps its own Python: its convolutions become stand-ins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from fxfact.copying import copy_sharing
from fxfact.passes.base import Applied, announce, record
from fxfact.passes.decomposing import Decomposing
from fxfact.planning import Plan
from fxfact.sites import ConvSite
from fxfact.stand_ins import stand_in


def swap_convs(network: nn.Module, sites: Mapping[str, ConvSite], plan: Plan, decomposing: Decomposing) -> nn.Module:
    """A copy of ``network`` with a stand-in for every planned convolution. Raises PlanError, WeightError, RankError."""
    plan.check_fits({path: (site.spec, site.tied_to) for path, site in sites.items()})
    result = copy_sharing(network, {id(sites[decision.path].weight) for decision in plan.rewrites})
    theirs = {path: _in(result, site) for path, site in sites.items()}
    errors = {}
    for chain in decomposing.chains(plan, theirs):
        spec, specs = sites[chain.path].spec, plan[chain.path].stages
        stand_in(result.get_submodule(chain.path), spec, specs, chain.stages)
        errors[chain.path] = chain.error
    record(result, Applied(plan, errors))
    announce("swap_convs", plan, result)
    return result


def _in(network: nn.Module, site: ConvSite) -> ConvSite:
    """The same site in a copy of the network."""
    held = network.get_submodule(site.path)._parameters
    weight = held["weight"]
    assert weight is not None
    return replace(site, weight=weight, bias=held.get("bias"))
