"""The pass: a plan carried out on a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxfact.conv import ConvLayer, compose
from fxfact.conv_modules import read_stages, write_chain
from fxfact.errors import ArgumentError, ArgumentTypeError, place
from fxfact.graph import check_contract, copy_sharing, match, refresh_shapes, splice
from fxfact.passes.base import Applied, applied, record
from fxfact.planning import Decision, Plan

Weights = Literal["decompose", "empty"]


@final
class FactorizeConvs(PassBase):
    """Put the planned chain in place of every planned convolution. The result is a new graph module.

    The graph module given is not changed. ``modified`` is False, and the result the module given, where the plan
    rewrites nothing or was the last one carried out. ``weights='empty'`` builds the structure without decomposing, for
    a state_dict to be loaded into. ``generator`` is used by factorizations that begin at random.
    Calling it raises PlanError for another model than the plan's, WeightError, RankError, ContractError.
    """

    def __init__(self, plan: Plan, *, weights: Weights = "decompose", generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not isinstance(plan, Plan):
            raise ArgumentTypeError(f"plan must be a fxfact.Plan, got {type(plan).__name__}. fxfact.plan makes one.")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ArgumentTypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if weights not in ("decompose", "empty"):
            raise ArgumentError(f"weights must be 'decompose' or 'empty', got {weights!r}")
        self._plan, self._weights, self._generator = plan, weights, generator

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise ContractError unless the graph is one that a pass can work on."""
        check_contract(graph_module, f"before {type(self).__name__}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Carry the plan out."""
        history = applied(graph_module)
        if not self._plan.rewrites or (history and history[-1].plan == self._plan):
            return PassResult(graph_module, False)
        theirs = {site.path: site for site in match(graph_module).sites}
        self._plan.check_fits({path: (site.layer.spec, site.tied_to) for path, site in theirs.items()})
        replaced = {id(theirs[decision.path].layer.weight) for decision in self._plan.rewrites}
        result = copy_sharing(graph_module, replaced)
        assert isinstance(result, fx.GraphModule)
        sites = {site.path: site for site in match(result).sites}
        stages: dict[str, list[nn.Module]] = {}
        weights: Sequence[Tensor]
        errors: dict[str, float | None] = {}
        for decision in self._plan.rewrites:
            site = sites[decision.path]
            with place(decision.path):
                if site.tied_to in stages:
                    weights = [stage.weight for stage in read_stages(stages[site.tied_to]).layers]
                    errors[site.path] = errors[site.tied_to]
                elif self._weights == "empty":
                    weights = [site.layer.weight.new_empty(spec.weight_shape) for spec in decision.stages]
                    errors[site.path] = None
                else:
                    weights, errors[site.path] = self._decompose(site.layer, decision)
                stages[site.path] = write_chain(decision.stages, weights, site.layer.bias, like=site.layer.weight)
        for path, modules in stages.items():
            splice(result, sites[path], modules, pass_name=f"fxfact.{type(self).__name__}")
        result.recompile()
        refresh_shapes(result)
        record(result, Applied(self._plan, errors))
        check_contract(result, f"behind {type(self).__name__}")
        return PassResult(result, True)

    def _decompose(self, layer: ConvLayer, decision: Decision) -> tuple[list[Tensor], float]:
        """The stages' weights, and the relative error of the kernel that they compose to."""
        assert decision.factorization is not None
        assert decision.rank is not None
        dense = layer.weight.detach()
        chain = decision.factorization.decompose(layer, decision.rank, generator=self._generator)
        wide = torch.promote_types(dense.dtype, torch.float32)
        norm = float(dense.to(wide).norm())
        missed = float((compose(chain).to(wide) - dense.to(wide)).norm())
        return [stage.weight for stage in chain.layers], missed / norm if norm else 0.0
