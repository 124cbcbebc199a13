"""The cheapest network whose loss, measured on data, stays under a bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxfact.calibration import Likelihood, Statistics
from fxfact.capture import Captured, ExampleInputs, run_model
from fxfact.conv import compose, to_torch
from fxfact.copying import private_copy
from fxfact.planning import Decision, Plan
from fxfact.sites import ConvSite
from fxfact.verification import with_kernels

_HALVINGS = 8


def cheapest_within(
    nats: float,
    plan_for: Callable[[float], Plan],
    captured: Captured,
    *,
    statistics: Statistics,
    likelihood: Likelihood,
    held_out: Sequence[ExampleInputs],
) -> Plan:
    """The cheapest of the plans that ``plan_for`` gives for shares of the dense cost, 0 … 1, whose ``measured`` loss is
    within ``nats``; found by halving, to a 256th of the way between its cheapest network and the dense one.
    """
    measure = _Measure(captured, statistics, likelihood, held_out)
    dense = plan_for(1.0)
    network = dense.network.macs or dense.network.params
    cheapest = dense.front[0].cost if dense.front else dense.network
    low, high = (cheapest.macs or cheapest.params) / network, 1.0
    best = replace(dense, measured=measure(dense))
    if measure(dense) > nats:  # even what costs next to nothing by prediction
        for decision in dense.rewrites:
            best = best.edited(decision.path, skip="the loss cannot bear it")
        best = replace(best, measured=0.0)
    for _ in range(_HALVINGS if dense.front else 0):
        middle = (low + high) / 2
        plan = plan_for(middle)
        loss = measure(plan)
        if loss <= nats:
            best, high = replace(plan, measured=loss), middle
        else:
            low = middle
    return best


class _Measure:
    """The mean divergence from the original on held-out data of the network that a plan would make."""

    def __init__(
        self, captured: Captured, statistics: Statistics, likelihood: Likelihood, held_out: Sequence[ExampleInputs]
    ) -> None:
        self._captured, self._statistics, self._likelihood = captured, statistics, likelihood
        self._held_out = held_out
        self._sites = {site.path: site for site in captured.sites}
        self._kernels: dict[tuple[str, str], Tensor] = {}
        self._expected = self._outputs({})

    def __call__(self, plan: Plan) -> float:
        """Nats for one sample."""
        kernels = {d.path: self._kernel(d) for d in plan.rewrites}
        pairs = zip(self._expected, self._outputs(kernels), strict=True)
        parts = [self._likelihood.divergence(one, other, self._statistics.variance) for one, other in pairs]
        return float(torch.cat(parts).mean())

    def _kernel(self, decision: Decision) -> Tensor:
        site: ConvSite = self._sites[decision.tied_to or decision.path]
        key = (site.path, f"{decision.factorization} {decision.rank}")
        if key not in self._kernels and decision.factorization and decision.rank:
            metric = self._statistics.metric(site.path, site.spec)
            chain = decision.factorization.decompose(site.layer, decision.rank, metric=metric)
            self._kernels[key] = to_torch(site.spec, compose(chain))
        return self._kernels[key]

    def _outputs(self, kernels: dict[str, Tensor]) -> list[object]:
        network = with_kernels(private_copy(self._captured.network), kernels)
        network.eval()
        return [run_model(network, batch) for batch in self._held_out]
