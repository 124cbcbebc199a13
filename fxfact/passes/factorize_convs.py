"""The pass: a plan carried out on a graph."""

from __future__ import annotations

from typing import final

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxfact.errors import ArgumentTypeError
from fxfact.graph import check_invariants, match, refresh_shapes, splice
from fxfact.passes.decomposition import DecomposeOptions
from fxfact.passes.history import PassRecord, add_record, log_pass, pass_history
from fxfact.planning import Plan
from fxfact.utils import copy_with_shared


@final
class FactorizeConvs(PassBase):
    """Put the planned chain in place of every planned convolution. The result is a new graph module.

    The graph module given is not changed. ``modified`` is False, and the result the module given, where the plan
    rewrites nothing or was the last one carried out. ``decomposing`` says how the chains' weights are found.
    Calling it raises PlanError for another model than the plan's, WeightError, RankError, GraphError.
    """

    def __init__(self, plan: Plan, *, decomposing: DecomposeOptions | None = None) -> None:
        super().__init__()
        if not isinstance(plan, Plan):
            raise ArgumentTypeError(f"plan must be a fxfact.Plan, got {type(plan).__name__}. fxfact.plan makes one.")
        self._plan, self._decomposing = plan, decomposing or DecomposeOptions()

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise GraphError unless the graph is one that a pass can work on."""
        check_invariants(graph_module, f"before {type(self).__name__}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Carry the plan out."""
        history = pass_history(graph_module)
        if history and history[-1].plan == self._plan:
            return PassResult(graph_module, False)
        theirs = {site.path: site for site in match(graph_module).sites}
        self._plan.check_fits({path: (site.spec, site.tied_to) for path, site in theirs.items()})
        if not self._plan.rewrites:
            return PassResult(graph_module, False)
        replaced = {id(theirs[decision.path].weight) for decision in self._plan.rewrites}
        result = copy_with_shared(graph_module, replaced)
        assert isinstance(result, fx.GraphModule)
        sites = {site.path: site for site in match(result).sites}
        errors = {}
        for chain in self._decomposing.chains(self._plan, sites):
            splice(result, sites[chain.path], chain.stages, pass_name=f"fxfact.{type(self).__name__}")
            errors[chain.path] = chain.error
        result.recompile()
        refresh_shapes(result)
        add_record(result, PassRecord(self._plan, errors))
        check_invariants(result, f"behind {type(self).__name__}")
        log_pass(type(self).__name__, self._plan, result)
        return PassResult(result, True)
