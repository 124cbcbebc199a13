"""The pass: a plan carried out on a graph."""

from __future__ import annotations

from typing import final

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxfact.copying import copy_sharing
from fxfact.errors import ArgumentTypeError
from fxfact.graph import check_contract, match, refresh_shapes, splice
from fxfact.passes.base import Applied, announce, applied, record
from fxfact.passes.decomposing import Decomposing
from fxfact.planning import Plan


@final
class FactorizeConvs(PassBase):
    """Put the planned chain in place of every planned convolution. The result is a new graph module.

    The graph module given is not changed. ``modified`` is False, and the result the module given, where the plan
    rewrites nothing or was the last one carried out. ``decomposing`` says how the chains' weights are found.
    Calling it raises PlanError for another model than the plan's, WeightError, RankError, ContractError.
    """

    def __init__(self, plan: Plan, *, decomposing: Decomposing | None = None) -> None:
        super().__init__()
        if not isinstance(plan, Plan):
            raise ArgumentTypeError(f"plan must be a fxfact.Plan, got {type(plan).__name__}. fxfact.plan makes one.")
        self._plan, self._decomposing = plan, decomposing or Decomposing()

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise ContractError unless the graph is one that a pass can work on."""
        check_contract(graph_module, f"before {type(self).__name__}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Carry the plan out."""
        history = applied(graph_module)
        if history and history[-1].plan == self._plan:
            return PassResult(graph_module, False)
        theirs = {site.path: site for site in match(graph_module).sites}
        self._plan.check_fits({path: (site.spec, site.tied_to) for path, site in theirs.items()})
        if not self._plan.rewrites:
            return PassResult(graph_module, False)
        replaced = {id(theirs[decision.path].weight) for decision in self._plan.rewrites}
        result = copy_sharing(graph_module, replaced)
        assert isinstance(result, fx.GraphModule)
        sites = {site.path: site for site in match(result).sites}
        errors = {}
        for chain in self._decomposing.chains(self._plan, sites):
            splice(result, sites[chain.path], chain.stages, pass_name=f"fxfact.{type(self).__name__}")
            errors[chain.path] = chain.error
        result.recompile()
        refresh_shapes(result)
        record(result, Applied(self._plan, errors))
        check_contract(result, f"behind {type(self).__name__}")
        announce(type(self).__name__, self._plan, result)
        return PassResult(result, True)
