"""Plans for a loss, tried on data: how far the original with a plan's kernels in it is from itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fxfact.analysis import with_kernels
from fxfact.calibration import DivergenceEvaluator, Statistics, mean_and_error, significantly_negative
from fxfact.capture import Captured
from fxfact.conv import compose_weights, to_torch
from fxfact.passes import Decomposed, DecomposeOptions
from fxfact.planning import Decision, Plan
from fxfact.utils import alias_copy, to_eval

_SEED = 0  # of what begins at random


class PlanLoss:
    """How far the network that a plan would make is from the original on some data, which may be ``on_others`` than
    those learned from.
    """

    def __init__(
        self,
        captured: Captured,
        statistics: Statistics,
        original: DivergenceEvaluator,
        decomposing: DecomposeOptions,
        *,
        on_others: bool,
    ) -> None:
        self._captured, self._statistics, self._original = captured, statistics, original
        self._sites = {site.path: site for site in captured.sites}
        self._decomposing, self.on_others = decomposing, on_others
        self._known: dict[frozenset[str], Tensor] = {}
        self.decomposed: dict[str, Decomposed] = {}  # by ``Decision.rewrite``

    def __call__(self, plan: Plan) -> float:
        """Nats for one sample."""
        return mean_and_error(self._divergences(plan), everywhere=True)[0]

    def is_clear(self, better: Plan, than: Plan) -> bool:
        """Whether a plan measures better by more than what may be chance: two standard errors of the difference on the
        same samples.
        """
        return significantly_negative(self._divergences(better) - self._divergences(than), everywhere=True)

    def _divergences(self, plan: Plan) -> Tensor:
        key = frozenset(decision.rewrite for decision in plan.rewrites)
        if key not in self._known:
            own = {decision.path: self._own(decision) for decision in plan.rewrites}
            self._decompose({decision.rewrite: decision for decision in own.values()})
            kernels = {path: self._kernel(decision) for path, decision in own.items()}
            network = to_eval(with_kernels(alias_copy(self._captured.network), kernels))
            self._known[key] = self._original.divergences(network)
        return self._known[key]

    def _own(self, decision: Decision) -> Decision:
        """The same of the convolution whose weight it shares."""
        return replace(decision, path=decision.tied_to or decision.path)

    def _decompose(self, decisions: Mapping[str, Decision]) -> None:
        """What was not yet, of decisions by ``Decision.rewrite``."""
        new = {rewrite: decision for rewrite, decision in decisions.items() if rewrite not in self.decomposed}
        jobs = [(self._sites[decision.path], decision, _SEED) for decision in new.values()]
        results = self._decomposing.decomposed(jobs, self._statistics, "measuring")
        self.decomposed.update(zip(new, results, strict=True))

    def _kernel(self, decision: Decision) -> Tensor:
        """What the chain of a decision composes to, in PyTorch's layout."""
        weights, _ = self.decomposed[decision.rewrite]
        return to_torch(self._sites[decision.path].spec, compose_weights(decision.stages, weights))
