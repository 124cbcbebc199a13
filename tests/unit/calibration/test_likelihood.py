"""Likelihoods of the caller: functions and objects; and how a likelihood is carried along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.calibration.likelihood import CustomDivergence, own_likelihood
from fxfact.errors import ArgumentError, CalibrationError
from tests.support import Classifier


def _squared(expected: Tensor, found: Tensor) -> Tensor:
    return (expected - found).square().flatten(1).sum(1)


def _covariance(function: Any, output: Tensor, count: int = 4000) -> Tensor:
    """Return the covariance of the drawn gradients of the first sample."""
    generator = torch.Generator().manual_seed(0)
    many = output.expand(count, -1).clone().requires_grad_()
    ((_, drawn),) = CustomDivergence(function).draw(
        many, lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype)
    )
    return drawn.T @ drawn / count


def test_gradients_of_a_divergence_have_the_covariance_of_its_curvature() -> None:
    y = torch.tensor([[0.3, -0.5, 1.0, 0.0]])

    def kl(expected: Tensor, found: Tensor) -> Tensor:
        return (expected.softmax(1) * (expected.log_softmax(1) - found.log_softmax(1))).sum(1)

    p = y[0].softmax(0)
    torch.testing.assert_close(_covariance(kl, y), torch.diag(p) - p[:, None] * p, rtol=0.1, atol=0.01)
    torch.testing.assert_close(_covariance(_squared, y), 2 * torch.eye(4), rtol=0.1, atol=0.1)
    mixing = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.5, 0.0]])

    def mixed(expected: Tensor, found: Tensor) -> Tensor:
        return ((expected - found) @ mixing.to(found).T).square().sum(1)

    torch.testing.assert_close(_covariance(mixed, y), 2 * mixing.T @ mixing, rtol=0.1, atol=0.3)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.head(self.body(x).relu()).mean((2, 3))
        return {"scores": x[:, :4], "boxes": x[:, 4:]}


def test_divergence_of_the_caller_measures_and_serves_loss_refit_and_distill(x: Tensor) -> None:
    torch.manual_seed(0)
    model = TwoHeads().eval()

    def own(expected: dict[str, Tensor], found: dict[str, Tensor]) -> Tensor:
        return _squared(expected["scores"], found["scores"]) + 0.1 * _squared(expected["boxes"], found["boxes"])

    small = fxfact.factorize(
        model, budget=fxfact.Loss(0.05), calibration=x.split(8), likelihood=own, example_inputs=x[:1]
    )
    measured = fxfact.plan_of(small).measured_loss_increase
    assert measured is not None
    assert measured <= 0.05
    _, result = fxfact.refit(small, model, x.split(4), likelihood=own)
    assert result.after <= result.before
    fxfact.distill(small, model, x.split(4), likelihood=own, steps=2)


def test_object_of_the_caller_is_used(x: Tensor) -> None:
    class Own:
        def draw(self, output: Any, normal: Any) -> Sequence[tuple[Tensor, Tensor]]:
            return [(output["scores"], normal(output["scores"]))]

        def divergence(self, expected: Any, found: Any) -> Tensor:
            return _squared(expected["scores"], found["scores"]) / 2

    torch.manual_seed(0)
    plan = fxfact.plan(
        TwoHeads().eval(),
        budget=fxfact.Macs(0.6),
        calibration=x.split(8),
        held_out=x.split(8),
        likelihood=Own(),
        example_inputs=x[:1],
    )
    assert plan.measured_loss_increase is not None
    assert plan.outputs == ()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda expected, found: -_squared(expected, found), "curvature of the divergence is negative"),
        (lambda expected, found: torch.zeros(len(found)), "does not depend on its second argument"),
        (lambda expected, found: 0 * found.sum(1), "no curvature where both outputs are equal"),
        (lambda expected, found: (found - found.detach()).sum(1), "no curvature"),
        (lambda expected, found: _squared(expected, found).sum(), r"one number a sample \(n,\), got \(\)"),
        (lambda expected, found: 1.0, r"one number a sample \(n,\), got float"),
        (lambda expected, found: expected["scores"], "the divergence failed on the model's outputs"),
        (lambda expected, found: _squared(expected, found.detach()), "does not depend on its second argument"),
    ],
)
def test_divergence_that_cannot_be_used_is_refused(function: Any, message: str, x: Tensor) -> None:
    with pytest.raises(CalibrationError, match=message):
        fxfact.calibrate(Classifier().eval(), [x], likelihood=function)


def test_loss_of_one_output_gives_statistics_but_cannot_measure(model: nn.Module, x: Tensor) -> None:
    def loss(output: Tensor) -> Tensor:
        return output.square().sum()

    own = fxfact.calibrate(model, [x], likelihood=loss)
    assert own.samples == len(x)
    with pytest.raises(CalibrationError, match=r"cannot measure how far two outputs are apart"):
        fxfact.plan(model, budget=fxfact.Macs(0.6), calibration=own, held_out=[x], example_inputs=x[:1])
    with pytest.raises(CalibrationError, match="the function failed on the model's output: TypeError"):
        fxfact.calibrate(model, [x], likelihood=lambda output: output + "text")


def test_statistics_and_plans_know_the_outputs(model: nn.Module, x: Tensor, tmp_path: Any) -> None:
    statistics = fxfact.calibrate(model, x.split(8))
    (part,) = statistics.outputs
    assert part.shape[0] == 8
    statistics.save(tmp_path / "statistics.npz")
    again = fxfact.Statistics.load(tmp_path / "statistics.npz")
    assert list(map(str, again.outputs)) == list(map(str, statistics.outputs))
    plan = fxfact.plan(model, budget=fxfact.Macs(0.6), calibration=again, held_out=[x], example_inputs=x[:1])
    assert f"outputs: {again.outputs[0]}" in str(plan)
    plan.save(tmp_path / "plan.json")
    assert list(map(str, fxfact.Plan.load(tmp_path / "plan.json").outputs)) == list(map(str, plan.outputs))


def test_likelihood_in_a_file_of_statistics_must_be_passed_again(model: nn.Module, x: Tensor, tmp_path: Any) -> None:
    fxfact.calibrate(model, x.split(8), likelihood=_squared).save(tmp_path / "statistics.npz")
    again = fxfact.Statistics.load(tmp_path / "statistics.npz")
    arguments: dict[str, Any] = {"budget": fxfact.Macs(0.6), "calibration": again, "held_out": [x]}
    with pytest.raises(CalibrationError, match="Pass it as likelihood="):
        fxfact.plan(model, example_inputs=x[:1], **arguments)
    assert fxfact.plan(model, example_inputs=x[:1], likelihood=_squared, **arguments).measured_loss_increase is not None


def test_likelihood_without_batches_is_refused(model: nn.Module, x: Tensor) -> None:
    statistics = fxfact.calibrate(model, [x])
    with pytest.raises(ArgumentError, match="there are none: pass calibration"):
        fxfact.plan(model, rank=0.5, likelihood="gaussian")
    with pytest.raises(ArgumentError, match="The statistics know it"):
        fxfact.plan(model, rank=0.5, calibration=statistics, likelihood="gaussian")
    for given in (None, statistics, [x]):
        with pytest.raises(CalibrationError, match="likelihood cannot be 5"):
            fxfact.plan(model, rank=0.5, calibration=given, likelihood=5)  # type: ignore[arg-type]


def test_outputs_without_gradients_are_left_out_or_refused(x: Tensor) -> None:
    class Detached(TwoHeads):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            out = super().forward(x)
            return {"scores": out["scores"], "boxes": out["boxes"].detach()}

    class AllDetached(TwoHeads):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {name: tensor.detach() for name, tensor in super().forward(x).items()}

    outputs = {part.name: part for part in fxfact.calibrate(Detached().eval(), x.split(8)).outputs}
    assert outputs["boxes"].reason == "no gradient flows from it to a convolution"
    assert outputs["scores"].distribution is not None
    with pytest.raises(CalibrationError, match=r"no gradient flows from the outputs .*scores \(8, 4\)"):
        fxfact.calibrate(AllDetached().eval(), x.split(8))


def test_samples_are_counted_where_the_outputs_are(x: Tensor) -> None:
    class Scaled(Classifier):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"scale": self.head.bias[:1], "logits": super().forward(x)}

    class TimeMajor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).flatten(2).permute(2, 0, 1)  # positions, samples, classes

    assert fxfact.calibrate(Scaled().eval(), x.split(8)).samples == len(x)
    assert fxfact.calibrate(TimeMajor().eval(), x.split(8)).samples == len(x)


def test_requests_are_recognized() -> None:
    assert own_likelihood(None) is None
    assert own_likelihood("gaussian") is None
    assert own_likelihood({"a": None}) is None
    assert type(own_likelihood(_squared)).__name__ == "CustomDivergence"
    assert type(own_likelihood(torch.sum)).__name__ == "CustomLoss"
