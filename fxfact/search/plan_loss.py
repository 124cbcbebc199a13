"""Measures plans on data: how far the original network is from itself once it has the kernels of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from fxfact.calibration import DivergenceEvaluator, Statistics, mean_and_error, significantly_negative
from fxfact.capture import Captured
from fxfact.conv import compose_weights, to_torch
from fxfact.graph import with_kernels
from fxfact.passes import DecomposeJob, DecomposeOptions, Decomposition, decompose_sites
from fxfact.planning import Decision, Plan
from fxfact.utils import alias_copy, to_eval

_SEED = 0  # for factorizations that start from random factors


class PlanLoss:
    """Measures by how much a plan would increase the loss.

    Every kernel is decomposed by a quick fit, which suffices to compare plans. ``finish`` goes on with the fits of the
    plan that was chosen. The results are kept in ``decompositions``, by ``Decision.rewrite``. Divergences are kept too.

    Args:
        captured: the network that the plans are for.
        network: a private copy of it in evaluation mode. It gets the kernels of each plan in turn, unless it may keep
            state between calls: then each plan gets a copy of its own.
        statistics: the calibration statistics.
        evaluator: the original's outputs on the data to measure on.
        options: how kernels are decomposed.
        on_held_out: whether that data is other than the data that the statistics were collected from.
    """

    def __init__(
        self,
        captured: Captured,
        network: nn.Module,
        statistics: Statistics,
        evaluator: DivergenceEvaluator,
        options: DecomposeOptions,
        *,
        on_held_out: bool,
    ) -> None:
        self._network, self._statistics, self._evaluator, self._options = network, statistics, evaluator, options
        self.on_held_out = on_held_out
        self._captured = captured
        self._sites = {site.path: site for site in captured.sites}
        self._dense_kernels = {site.path: site.weight.detach() for site in captured.sites}
        self._divergences: dict[frozenset[str], Tensor] = {}
        self.decompositions: dict[str, Decomposition] = {}

    def mean(self, plan: Plan) -> float:
        """Return the mean increase of the loss in nats for one sample."""
        return mean_and_error(self.divergences(plan), everywhere=True)[0]

    def mean_alone(self, plan: Plan, path: str) -> float:
        """Return the mean increase if only the layer at ``path`` is rewritten, with those that share its weight."""
        self._decompose_quickly(plan.rewrites)  # those of a joint set only together
        rewrites = [decision for decision in plan.rewrites if path in (decision.path, decision.tied_to)]
        return mean_and_error(self._divergences_of(rewrites), everywhere=True)[0]

    def is_clearly_better(self, plan: Plan, other: Plan) -> bool:
        """Return whether a plan measures better than another by more than may be chance.

        That is two standard errors of the differences on the same samples.
        """
        return significantly_negative(self.divergences(plan) - self.divergences(other), everywhere=True)

    def divergences(self, plan: Plan) -> Tensor:
        """Return the KL divergence of every sample (n,) in nats."""
        return self._divergences_of(plan.rewrites)

    def finish(self, plan: Plan) -> None:
        """Go on with the fits of a plan's kernels, so that they are those of the network that it makes."""
        leaders = (leader_decision(decision) for decision in plan.rewrites)
        quick = {
            d.rewrite: d
            for d in leaders
            if d.rewrite not in self.decompositions or self.decompositions[d.rewrite].quick
        }
        self._decompose(quick.values(), quick=False)
        self._divergences = {key: found for key, found in self._divergences.items() if not key & quick.keys()}

    def _divergences_of(self, rewrites: Sequence[Decision]) -> Tensor:
        key = frozenset(decision.rewrite for decision in rewrites)
        if key not in self._divergences:
            leaders = self._decompose_quickly(rewrites)
            kernels = {path: self._composed_kernel(decision) for path, decision in leaders.items()}
            network = with_kernels(self._fresh_network(), {**self._dense_kernels, **kernels})
            self._divergences[key] = self._evaluator.divergences(network)
        return self._divergences[key]

    def _decompose_quickly(self, rewrites: Iterable[Decision]) -> dict[str, Decision]:
        """Decompose the kernels that have not been yet, and return for every path the decision that has its kernel."""
        leaders = {decision.path: leader_decision(decision) for decision in rewrites}
        self._decompose([d for d in leaders.values() if d.rewrite not in self.decompositions], quick=True)
        return leaders

    def _fresh_network(self) -> nn.Module:
        """Return a network whose buffers and other state are those of the captured one.

        Tracing refuses models that change their state in ``forward()``, so a traced graph serves all plans. It does not
        look into leaf modules.
        """
        if self._captured.frontend == "trace" and not self._captured.leaf_modules:
            return self._network
        return to_eval(alias_copy(self._captured.network))

    def _decompose(self, decisions: Iterable[Decision], *, quick: bool) -> None:
        by_rewrite = {decision.rewrite: decision for decision in decisions}
        starts = {rewrite: found.weights for rewrite, found in self.decompositions.items()}
        jobs = [
            DecomposeJob(self._sites[decision.path], decision, _SEED, starts.get(rewrite))
            for rewrite, decision in by_rewrite.items()
        ]
        label = "measuring" if quick else "decomposing"
        results = decompose_sites(jobs, self._options, self._statistics, label=label, quick=quick)
        self.decompositions.update(zip(by_rewrite, results, strict=True))

    def _composed_kernel(self, decision: Decision) -> Tensor:
        """Return the dense kernel that the chain of a decision equals, in PyTorch's layout."""
        weights = self.decompositions[decision.rewrite].weights
        return to_torch(self._sites[decision.path].spec, compose_weights(decision.stages, weights))


def leader_decision(decision: Decision) -> Decision:
    """Return the decision for the convolution whose weight this one shares."""
    return replace(decision, path=decision.tied_to or decision.path)
