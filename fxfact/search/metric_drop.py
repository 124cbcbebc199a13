"""Measures plans by the caller's own metric: by how much it may be worse than that of the dense network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfact.calibration import Statistics, gather_objects, mean_and_error
from fxfact.capture import Captured
from fxfact.conv import Cost
from fxfact.errors import BudgetError, MetricError
from fxfact.passes import DecomposeJob, DecomposeOptions, Decomposition, apply_plan, decompose_sites
from fxfact.planning import MeasuredPoint, Metric, Plan
from fxfact.search.cheapest import Limit
from fxfact.search.plan_loss import leader_decision
from fxfact.utils import tensor_digest, to_eval, warn_caller

Refit = Callable[[nn.Module], nn.Module]
_DENSE_CALLS = 2  # on the dense network
_SLOPE = 0.5  # the power of the predicted loss increase that the drop usually is


class MetricDrop:
    """Measures by how much plans worsen the caller's metric.

    The dense network is measured at once, twice, so that a function that fails, or whose result is random, is known
    before anything expensive is done.

    Args:
        metric: the caller's metric.
        captured: the network that the plans are for.
        dense: its plan without rewrites.
        options: how kernels are decomposed.
        refit: refits a factorized network before it is measured. None: it is measured as it is.

    Attributes:
        points: every network that was measured, the dense one first.
        refit: as passed.

    Raises:
        MetricError: if the metric cannot be measured on the dense network.
        BudgetError: if there are too few scores to bound any drop by what is asked for.
    """

    def __init__(
        self, metric: Metric, captured: Captured, dense: Plan, options: DecomposeOptions, refit: Refit | None = None
    ) -> None:
        self._metric, self._captured, self._options, self.refit = metric, captured, options, refit
        self._sites = {site.path: site for site in captured.sites}
        self._drops: dict[frozenset[str], float] = {frozenset(): 0.0}
        self._count: int | None = None  # of scores
        network = self._network(dense, None, {})
        first, second = (self._evaluate(network, "the dense network") for _ in range(_DENSE_CALLS))
        if not torch.equal(first, second):
            change = abs(float(second.mean() - first.mean()))
            warn_caller(
                f"evaluate is random: two calls on the dense network differ by {change:.3g} in the mean, and the bound "
                "is no more reliable than that. Fix the seeds in evaluate, and leave the network in evaluation mode."
            )
        self._dense = (first + second) / 2
        check_enough_scores(metric, self._dense)
        _warn_if_loose(metric, self._mean(self._dense))
        self.points = [MeasuredPoint(dense.network, 0.0, 0.0, self._mean(self._dense), drop_at_most=0.0)]

    def points_beside(self, network: Cost) -> tuple[MeasuredPoint, ...]:
        """Return every network that was measured, with the cost of the dense one, whose time is measured later."""
        dense, *others = self.points
        return (replace(dense, cost=network), *others)

    def limit(self, statistics: Statistics | None, decompositions: dict[str, Decomposition]) -> Limit:
        """Return how much worse networks may be.

        Args:
            statistics: the calibration statistics, if any.
            decompositions: by ``Decision.rewrite``, kernels that were decomposed before. Further ones are added.
        """
        metric = self._metric
        return Limit(
            lambda plan: self._measure(plan, statistics, decompositions),
            metric.at_most_drop,
            trials=metric.evaluations - _DENSE_CALLS,
            slope=_SLOPE,
            subject="metric",
        )

    def _measure(self, plan: Plan, statistics: Statistics | None, decompositions: dict[str, Decomposition]) -> float:
        """Return by how much the plan's network is worse than the dense one, at most.

        That is the upper confidence limit of the mean drop if there is one score for each sample, else the drop itself.
        """
        rewrites = frozenset(decision.rewrite for decision in plan.rewrites)
        if rewrites not in self._drops:
            unit, after = self._metric.minimise(1.0), plan.after
            role = f"the network with {unit.amount(after) / unit.amount(plan.network):.2f} of the {unit.unit}"
            scores = self._evaluate(self._network(plan, statistics, decompositions), role)
            drop = self._drops[rewrites] = largest_drop(self._metric, self._dense, scores)
            predicted, measured = plan.predicted_loss_increase, plan.measured_loss_increase
            point = MeasuredPoint(after, predicted, measured, self._mean(scores), drop_at_most=drop)
            self.points.append(replace(point, refitted=self.refit is not None and bool(rewrites)))
        return self._drops[rewrites]

    def _mean(self, scores: Tensor) -> float:
        """Return the caller's metric."""
        mean = float(scores.mean())
        return -mean if self._metric.lower_is_better else mean

    def _network(
        self, plan: Plan, statistics: Statistics | None, decompositions: dict[str, Decomposition]
    ) -> nn.Module:
        """Return the network of a plan, which shares no memory with the caller's model."""
        missing = {
            decision.rewrite: decision
            for decision in map(leader_decision, plan.rewrites)
            if decision.rewrite not in decompositions
        }
        jobs = [DecomposeJob(self._sites[decision.path], decision) for decision in missing.values()]
        results = decompose_sites(jobs, self._options, statistics, label="decomposing")
        decompositions.update(zip(missing, results, strict=True))
        network = apply_plan(plan, self._captured, self._options, statistics=statistics, known=decompositions)
        if isinstance(network, ExportedProgram):
            return to_eval(network.module())
        return to_eval(self.refit(network) if self.refit is not None and plan.rewrites else network)

    def _evaluate(self, network: nn.Module, role: str) -> Tensor:
        """Return the scores (n,) of a network, or (1,) of a single number, from all processes. Higher is better."""
        try:
            own: Tensor | MetricError = self._evaluate_here(network, role)
        except MetricError as error:  # the other processes must know, or they would wait for this one
            own = error
        found = gather_objects(own)
        for each in (own, *found):
            if isinstance(each, MetricError):
                raise each
        scores = torch.cat(found)
        return scores.mean(0, keepdim=True) if len(scores) == len(found) else scores

    def _evaluate_here(self, network: nn.Module, role: str) -> Tensor:
        tensors = {"the network": network, "the original model": self._captured.network}
        before = {owner: _digests(each) for owner, each in tensors.items()}
        try:
            with torch.no_grad():
                returned = self._metric.evaluate(network)
        except Exception as error:
            raise MetricError(f"evaluate raised on {role}: {type(error).__name__}: {error}") from error
        for owner, each in tensors.items():
            after = _digests(each)
            if changed := [name for name, digest in before[owner].items() if after.get(name) != digest]:
                raise MetricError(
                    f"evaluate changed {owner}: {', '.join(changed[:3])} has other values after it measured {role}. "
                    "Do not call train() on the network, and work on copy.deepcopy(network)."
                )
        return self._checked(returned, role)

    def _checked(self, returned: object, role: str) -> Tensor:
        """Return what evaluate returned as scores (n,), double, on the CPU. Raises MetricError."""
        advice = "Return a number, or a tensor (n,) with the score of each sample."
        try:
            values = torch.as_tensor(returned).detach().cpu()
            scores = values.to(torch.promote_types(values.dtype, torch.float64), copy=True)  # evaluate may reuse it
        except Exception as error:
            raise MetricError(f"evaluate returned a {type(returned).__name__} for {role}. {advice}") from error
        if scores.ndim > 1 or not scores.numel() or scores.is_complex():
            kind = f"{type(returned).__name__} ({values.dtype} of shape {tuple(values.shape)})"
            raise MetricError(f"evaluate returned a {kind} for {role}. {advice}")
        if bad := int((~scores.isfinite()).sum()):
            raise MetricError(
                f"evaluate returned {bad} NaN or Inf of {scores.numel()} values for {role}. Return the worst possible "
                "score instead where nothing can be measured."
            )
        if self._count not in (None, scores.numel()):
            raise MetricError(
                f"evaluate returned {scores.numel()} scores for {role}, and {self._count} before. Return the scores of "
                "the same samples in the same order in every call."
            )
        self._count = scores.numel()
        return -scores.flatten() if self._metric.lower_is_better else scores.flatten()


def _warn_if_loose(metric: Metric, dense: float) -> None:
    """Warn if a score that has no negative values could fall to zero within the bound."""
    if not metric.lower_is_better and 0 < dense <= metric.at_most_drop:
        warn_caller(
            f"at_most_drop={metric.at_most_drop:g} is not less than the metric of the dense network, {dense:.4g}, so "
            "it may be lost altogether. at_most_drop is in the unit of the metric: pass 0.01 for a point of accuracy "
            "between 0 and 1."
        )


def check_enough_scores(metric: Metric, dense: Tensor) -> None:
    """Raise BudgetError if scores (n,) of two values, such as right and wrong, are too few to show anything."""
    count, bound = len(dense), metric.at_most_drop
    if count == 1 or len(set(dense.tolist())) > 2:
        return
    least = largest_mean(torch.zeros_like(dense), _spread(dense), _confidence(metric))
    if least > bound:
        more = f" (about {math.ceil(count * least / bound):,})" if bound else ""
        raise BudgetError(
            f"{count} scores cannot show that the metric drops by at most {bound:g}: even if a network had the same "
            f"scores, the mean of other samples could be {least:.3g} worse, at {metric.confidence:.0%} confidence. "
            f"Evaluate more samples{more}, raise at_most_drop, or return the mean as one number, whose bound holds for "
            "these samples only.",
            least,
        )


def largest_drop(metric: Metric, dense: Tensor, scores: Tensor) -> float:
    """Return by how much a network may be worse than the dense one: scores (n,) of both, or one number (1,) of each.

    The confidence is divided among the networks that are measured, so that all bounds hold together (Bonferroni).
    """
    drops = dense - scores
    return float(drops) if len(drops) == 1 else largest_mean(drops, _spread(dense), _confidence(metric))


def _confidence(metric: Metric) -> float:
    return 1 - (1 - metric.confidence) / (metric.evaluations - _DENSE_CALLS)


def _spread(scores: Tensor) -> float:
    return float(scores.max() - scores.min())


def largest_mean(values: Tensor, spread: float, confidence: float) -> float:
    """Return the upper confidence limit of the mean of what the values (n,) were drawn from.

    This is the limit of Student's t-test. One more value is counted, as large as the largest magnitude among them, or
    ``spread`` if all are 0, because rare large values may not be among n.

    Args:
        values: independent values.
        spread: how large a value may be.
        confidence: the probability that the mean is not larger.
    """
    worst = float(values.abs().max()) or spread
    mean, error = mean_and_error(torch.cat([values, values.new_tensor([worst])]))
    return mean + _student_t(confidence, len(values)) * error


def _student_t(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5)."""
    z = NormalDist().inv_cdf(probability)
    terms: tuple[float, ...] = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return math.fsum(term / freedom**k for k, term in enumerate(terms))


def _digests(network: nn.Module) -> Mapping[str, str]:
    """Return a hash of every parameter and buffer by name."""
    named = (*network.named_parameters(), *network.named_buffers())
    return {name: tensor_digest([tensor]) for name, tensor in named}
