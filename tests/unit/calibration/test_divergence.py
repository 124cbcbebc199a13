"""Divergence from the original, means and their significance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fxfact.calibration import DivergenceEvaluator, mean_and_error, significantly_negative
from fxfact.errors import CalibrationError, WeightError


def shifted(model: nn.Module, amount: float) -> nn.Module:
    """Add ``amount`` to the first logit."""
    shift = nn.Linear(4, 4)
    with torch.no_grad():
        shift.weight.copy_(torch.eye(4))
        shift.bias.copy_(torch.tensor([amount, 0.0, 0.0, 0.0]))
    return nn.Sequential(model, shift)


def test_categorical_divergence_is_the_kl_divergence_of_the_classes(model: nn.Module, x: Tensor) -> None:
    evaluator, other = DivergenceEvaluator(model, x.split(7), "categorical"), shifted(model, 1.0)
    p, q = (nn.functional.log_softmax(network(x).double(), dim=1) for network in (model, other))
    expected = nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(dim=1)
    torch.testing.assert_close(evaluator.divergences(other), expected.detach(), rtol=1e-4, atol=1e-6)
    assert evaluator.divergence(other) == pytest.approx(float(expected.detach().mean()), rel=1e-4)
    assert evaluator.divergence(model) == 0


def test_gaussian_divergence_is_half_the_square_over_the_variance(model: nn.Module, x: Tensor) -> None:
    evaluator = DivergenceEvaluator(model, x.split(7), "gaussian")
    outputs = model(x).detach().double()[:, 0]
    excess = max(0.0, float(((outputs - outputs.mean()) ** 4).mean() / outputs.var(correction=0) ** 2) - 3)
    variance = float(outputs.var()) * (1 + 2 * (excess / len(outputs)) ** 0.5)
    expected = torch.full((24,), 0.5**2 / 2 / variance, dtype=torch.float64)
    torch.testing.assert_close(evaluator.divergences(shifted(model, 0.5)), expected, rtol=1e-4, atol=0)


def test_original_whose_output_is_not_finite_is_refused(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"the model's output is NaN or Inf on this data.*mask with a"):
        DivergenceEvaluator(model, (1e38 * x).split(7), "gaussian")
    with pytest.raises(WeightError, match=r"because of its own weights: 1\.bias has 1 Inf among 4 values"):
        DivergenceEvaluator(shifted(model, math.inf), x.split(7), "gaussian")


def test_mean_and_standard_error() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    mean, error = mean_and_error(values)
    assert mean == 3.0
    assert error == pytest.approx(float(values.std()) / 2)
    assert mean_and_error(values[:1]) == (1.0, math.inf)


def test_mean_is_significant_beyond_two_standard_errors() -> None:
    values = torch.tensor([-1.0, 1.0] * 50, dtype=torch.float64)
    error = mean_and_error(values)[1]
    assert significantly_negative(values - 2.1 * error)
    assert not significantly_negative(values - 1.9 * error)
    assert not significantly_negative(values + 3.0 * error)
