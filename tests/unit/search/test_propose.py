"""The choice between proposed plans by their loss on data: a prediction that the data contradict is corrected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fxfact
from fxfact.search.propose import PlanProposer, best_plan, warn_if_contradicted
from tests.support import Classifier


class Losses:
    """Measures plans by a rule instead of running networks."""

    on_held_out = True

    def __init__(self, true: dict[str, float]) -> None:
        self.true, self.measured_alone = true, set[str]()

    def mean(self, plan: fxfact.Plan) -> float:
        return sum(self.true[d.path] * (d.predicted_loss_increase or 0.0) for d in plan.rewrites)

    def mean_alone(self, plan: fxfact.Plan, path: str) -> float:
        self.measured_alone.add(path)
        return self.true[path] * (plan[path].predicted_loss_increase or 0.0)

    def is_clearly_better(self, plan: fxfact.Plan, other: fxfact.Plan) -> bool:
        return self._unscaled(plan) < self._unscaled(other)

    def finish(self, plan: fxfact.Plan) -> None:
        self.finished = plan

    def _unscaled(self, plan: fxfact.Plan) -> float:
        return self.mean(plan)


@pytest.fixture(scope="module")
def plan() -> fxfact.Plan:
    torch.manual_seed(0)
    x = torch.randn(32, 3, 12, 12)
    model = Classifier().eval()
    return fxfact.plan(
        model, ["tucker", "channel_svd"], budget=fxfact.Macs(0.5), calibration=x.split(8), example_inputs=x[:1]
    )


def _proposer(plan: fxfact.Plan, cheaper: str, asked: list[dict[str, float]]) -> Any:
    """Propose the plan, or once its factor is known, the plan without the rewrite of ``cheaper``."""

    def propose(budget: Any, normalization: float, factors: Any) -> fxfact.Plan:
        asked.append(dict(factors))
        return plan.edited(cheaper, skip="corrected") if factors.get(cheaper, 1.0) > 3 else plan

    return propose


def test_contradicted_prediction_is_corrected(plan: fxfact.Plan) -> None:
    paths = [decision.path for decision in plan.rewrites]
    worst = max(plan.rewrites, key=lambda decision: decision.predicted_loss_increase or 0.0).path
    losses, asked = Losses({path: 20.0 if path == worst else 1.0 for path in paths}), []
    found = best_plan(fxfact.Macs(0.5), _proposer(plan, worst, asked), losses)  # type: ignore[arg-type]
    assert losses.measured_alone == set(paths)
    assert asked[-1][worst] == pytest.approx(20)
    assert worst not in {decision.path for decision in found.rewrites}
    assert found.measured_loss_increase == pytest.approx(losses.mean(found))


def test_prediction_that_stays_contradicted_warns(plan: fxfact.Plan) -> None:
    losses = Losses({decision.path: 50.0 for decision in plan.rewrites})
    found = best_plan(fxfact.Macs(0.5), lambda *given: plan, losses)  # type: ignore[arg-type]
    assert found.rewrites == plan.rewrites
    with pytest.warns(UserWarning, match=r"the loss grows by .* nats on the data, and .* were predicted"):
        warn_if_contradicted(found)


def test_prediction_that_holds_is_left(plan: fxfact.Plan, recwarn: pytest.WarningsRecorder) -> None:
    losses, asked = Losses({decision.path: 1.5 for decision in plan.rewrites}), []
    warn_if_contradicted(best_plan(fxfact.Macs(0.5), _proposer(plan, "first", asked), losses))  # type: ignore[arg-type]
    assert not losses.measured_alone
    assert asked == [{}, {}]
    assert not recwarn.list


def test_factors_reach_the_allocation(plan: fxfact.Plan) -> None:
    """A layer whose increases are multiplied by a large factor is rewritten less."""
    torch.manual_seed(0)
    x: Tensor = torch.randn(32, 3, 12, 12)
    model = Classifier().eval()
    captured_calls: list[Any] = []
    original = PlanProposer.propose

    def watching(self: Any, *given: Any, **named: Any) -> fxfact.Plan:
        captured_calls.append(self)
        return original(self, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlanProposer, "propose", watching)
        fxfact.plan(model, "channel_svd", budget=fxfact.Macs(0.6), calibration=x.split(8), example_inputs=x[:1])
    proposer = captured_calls[0]
    usual = proposer.propose(fxfact.Macs(0.6))
    rewritten = max(usual.rewrites, key=lambda d: d.before.macs - d.after.macs)  # type: ignore[operator]
    spared = proposer.propose(fxfact.Macs(0.6), factors={rewritten.path: 1e6})
    assert spared[rewritten.path].after.macs > rewritten.after.macs  # type: ignore[operator]
    assert spared.after.macs <= 0.6 * spared.network.macs  # type: ignore[operator]
