"""The pass that applies a plan to a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxfact.calibration import Statistics
from fxfact.conv import Skip
from fxfact.errors import ArgumentTypeError
from fxfact.graph import GraphSite, check_invariants, checked_match, refresh_shapes, splice, weight_at
from fxfact.passes.decomposition import DecomposeOptions, Decomposition, planned_chains
from fxfact.passes.history import PassRecord, add_record, log_pass, pass_history
from fxfact.planning import Plan
from fxfact.utils import copy_with_shared


@final
class FactorizeConvs(PassBase):
    """Replace every planned convolution of a graph module by its chain.

    Args:
        plan: the plan.
        options: how the chains get their weights.
        statistics: the calibration statistics that the plan was made with, if any.
        known: earlier decompositions, by ``Decision.rewrite``.

    Raises:
        ArgumentTypeError: if the plan is no plan.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        options: DecomposeOptions | None = None,
        statistics: Statistics | None = None,
        known: Mapping[str, Decomposition] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(plan, Plan):
            raise ArgumentTypeError(f"plan must be a fxfact.Plan, got {type(plan).__name__}. fxfact.plan makes one.")
        self._plan, self._options = plan, options or DecomposeOptions()
        self._statistics, self._known = statistics, known

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Check that the graph is well formed. ``call`` checks the recorded shapes of its convolutions.

        Args:
            graph_module: the graph module.

        Raises:
            ArgumentTypeError: if it is no graph module.
            GraphError: if a pass cannot work on the graph.
        """
        check_invariants(graph_module, self._occasion("before"), sites=())

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Apply the plan to a copy.

        Args:
            graph_module: the graph module, which is not changed.

        Returns:
            The result. If the plan rewrites nothing or was the last one applied, ``modified`` is False and the result
            is the module itself.

        Raises:
            PlanError: if the plan was made for another model.
            WeightError, RankError, CalibrationError: from the decomposition.
            GraphError: if the result is not a graph that a pass can work on.
        """
        history = pass_history(graph_module)
        if history and history[-1].plan == self._plan:
            return PassResult(graph_module, False)
        result = graph_module
        if self._plan.rewrites:
            weights = [weight_at(graph_module, decision.path) for decision in self._plan.rewrites]
            copied = copy_with_shared(graph_module, {id(weight) for weight in weights if weight is not None})
            assert isinstance(copied, fx.GraphModule)
            result = copied
        matched = checked_match(result, self._occasion("before"))
        sites = {site.path: site for site in matched.sites}
        skipped = {item.subject: item.reason for item in matched.found if isinstance(item, Skip)}
        self._plan.check_fits({path: (site.spec, site.tied_to) for path, site in sites.items()}, skipped)
        if not self._plan.rewrites:
            return PassResult(graph_module, False)
        errors: dict[str, float | None] = {}
        digests: dict[str, str] = {}
        stages: list[GraphSite] = []
        chains = planned_chains(self._plan, sites, self._options, statistics=self._statistics, known=self._known)
        for chain in chains:
            stages += splice(result, sites[chain.path], chain.stages, pass_name=f"fxfact.{type(self).__name__}")
            errors[chain.path], digests[chain.path] = chain.relative_error, chain.weight_digest()
        result.recompile()
        refresh_shapes(result)
        add_record(result, PassRecord(self._plan, errors, digests))
        dense = [site for path, site in sites.items() if path not in errors]
        check_invariants(result, self._occasion("after"), sites=[*dense, *stages])
        log_pass(type(self).__name__, self._plan, result)
        return PassResult(result, True)

    def _occasion(self, when: str) -> str:
        return f"{when} {type(self).__name__}"
