"""The distributions: Fisher information, divergence, scales for saturated outputs, robust variances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxfact.calibration.distributions import Bernoulli, Categorical, Distribution, Gaussian

_SAMPLES = 200_000


def _covariance(distribution: Distribution, values: Tensor) -> Tensor:
    """Return the covariance of the gradients that are drawn for one sample with these values (channels,)."""
    many = values[None, :, None].expand(_SAMPLES, -1, 1)
    normal = torch.randn(many.shape, generator=torch.Generator().manual_seed(0), dtype=values.dtype)
    drawn = distribution.draw(many, normal)[:, :, 0]
    return drawn.T @ drawn / _SAMPLES


def _softened_fisher(distribution: Categorical | Bernoulli, values: Tensor) -> Tensor:
    """Return JᵀFJ, with F the Fisher information of the softened logits and J the derivative of the logits."""
    slopes = torch.autograd.functional.jacobian(lambda v: distribution.logits(v[None, :, None])[0, :, 0], values)
    logits = distribution.logits(values[None, :, None])[0, :, 0] / 2
    p = logits.softmax(0) if isinstance(distribution, Categorical) else logits.sigmoid()
    information = torch.diag(p) - p[:, None] * p if isinstance(distribution, Categorical) else torch.diag(p * (1 - p))
    result: Tensor = slopes.T @ information @ slopes
    return result


@pytest.mark.parametrize(
    ("distribution", "values"),
    [
        (Categorical(), torch.tensor([1.0, -1.0, 0.5, 2.0])),
        (Categorical("logits", 4.0), torch.tensor([4.0, -4.0, 2.0, 8.0])),
        (Categorical("log-probabilities"), torch.tensor([1.0, -1.0, 0.5, 2.0]).log_softmax(0)),
        (Categorical("probabilities"), torch.tensor([1.0, -1.0, 0.5, 2.0]).softmax(0)),
        (Bernoulli("logits"), torch.tensor([1.0, -1.0, 3.0])),
        (Bernoulli("probabilities", 2.0), torch.tensor([0.1, 0.5, 0.9])),
    ],
)
def test_gradients_have_the_covariance_of_the_fisher_information(
    distribution: Categorical | Bernoulli, values: Tensor
) -> None:
    expected = _softened_fisher(distribution, values)
    error = (_covariance(distribution, values) - expected).abs().max() / expected.abs().max()
    assert float(error) < 0.02


def test_gradients_of_numbers_have_the_covariance_of_the_precision() -> None:
    expected = torch.diag(1 / torch.tensor([4.0, 0.25]))
    found = _covariance(Gaussian((4.0, 0.25)), torch.zeros(2))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("logits", torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)),
        ("probabilities", torch.rand(8, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)),
    ],
)
def test_divergence_is_that_of_pytorch(name: str, values: Tensor) -> None:
    other = values.roll(1, 0)
    p, q = (torch.distributions.Bernoulli(**{name.replace("probabilities", "probs"): v}) for v in (values, other))
    expected = torch.distributions.kl_divergence(p, q).sum((1, 2))
    torch.testing.assert_close(Bernoulli(name).divergence(values, other), expected, rtol=1e-5, atol=1e-6)
    if name == "logits":
        p, q = (torch.distributions.Categorical(logits=v.movedim(1, -1)) for v in (values, other))
        expected = torch.distributions.kl_divergence(p, q).sum(1)
        torch.testing.assert_close(Categorical().divergence(values, other), expected)
        for form, read in (("probabilities", torch.softmax), ("log-probabilities", torch.log_softmax)):
            found = Categorical(form).divergence(read(values, 1), read(other, 1))
            torch.testing.assert_close(found, expected)


def test_divergence_of_numbers_is_that_of_normal_distributions() -> None:
    values = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    normal = [torch.distributions.Normal(v, torch.tensor([2.0, 0.5]).reshape(2, 1, 1)) for v in (values, 2 * values)]
    expected = torch.distributions.kl_divergence(*normal).sum((1, 2, 3))
    torch.testing.assert_close(Gaussian((4.0, 0.25)).divergence(values, 2 * values), expected)


@pytest.mark.parametrize("distribution", [Categorical(), Bernoulli("logits")])
def test_saturated_logits_are_scaled_down(distribution: Categorical | Bernoulli) -> None:
    values = 3 * torch.randn(256, 10, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert distribution.fitted(values).scale == 1
    for factor in (100, 1000):
        fitted = distribution.fitted(factor * values)
        assert factor / 40 < fitted.scale < factor
        drawn = fitted.draw(factor * values, torch.randn(values.shape, dtype=torch.float64)) * factor
        usual = distribution.draw(values, torch.randn(values.shape, dtype=torch.float64))
        assert 0.1 < float(drawn.norm() / usual.norm()) < 100  # gradients do not vanish


def test_saturated_probabilities_have_gradients() -> None:
    logits = 40 * torch.randn(64, 10, 1, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    p = logits.softmax(1)
    fitted = Categorical("probabilities").fitted(p.detach().double())
    normal = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    (through,) = torch.autograd.grad(p, logits, fitted.draw(p.detach(), normal))
    direct = Categorical("logits", fitted.scale).draw(logits.detach(), normal)
    assert bool(through.isfinite().all())
    assert float((through - direct).norm() / direct.norm()) < 0.05


def test_variances_are_taken_over_samples_not_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors = 100 * torch.arange(50.0, dtype=torch.float64)
    values = anchors + 3 * torch.randn(2000, 2, 50, generator=generator, dtype=torch.float64)
    assert Gaussian().fitted(values).variances == pytest.approx((9.0, 9.0), rel=0.1)


def test_variances_are_robust() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 3, 1, generator=generator, dtype=torch.float64)
    values[:, 1] = 5.0  # constant
    values[:, 2] = 0.0
    values[0, 2] = 1.0  # active for one sample
    usual, constant, rare = Gaussian().fitted(values).variances
    assert constant == max(usual, rare)
    assert rare > 2 * float(values[:, 2].var())
    assert Gaussian().fitted(torch.ones(1, 2, 1, dtype=torch.float64)).variances == (1.0, 1.0)


def test_information_is_what_a_constant_prediction_loses() -> None:
    one_hot = torch.eye(10, dtype=torch.float64).repeat(5, 1)[:, :, None]
    assert Categorical("probabilities").information(one_hot) == pytest.approx(float(torch.tensor(10.0).log()), rel=1e-6)
    assert Bernoulli().information(one_hot[:, :1]) == pytest.approx(
        0.1 * 2.302585 - 0.9 * float(torch.tensor(0.9).log()), 1e-3
    )
    assert Gaussian().information(torch.zeros(3, 4, 5)) == 10
    for distribution in (Categorical(), Bernoulli("logits")):
        assert distribution.information(torch.ones(8, 3, 1, dtype=torch.float64)) == pytest.approx(0, abs=1e-9)
