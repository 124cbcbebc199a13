"""Measures how far networks are from their original on some batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxfact.calibration.batches import run_batch
from fxfact.calibration.likelihood import Likelihood, resolve_likelihood
from fxfact.calibration.processes import all_reduce
from fxfact.capture import ExampleInputs
from fxfact.errors import CalibrationError
from fxfact.utils import check_finite_state

_SIGNIFICANT = 2.0  # standard errors


class DivergenceEvaluator:
    """Measures the KL divergence of networks from their original on fixed batches.

    The original runs once, when the evaluator is created.

    Args:
        original: The network to compare with, in evaluation mode.
        batches: The batches to measure on.
        likelihood: How to read the output, as in ``fxfact.plan``; it must be one that can measure.

    Attributes:
        likelihood: The likelihood by which outputs are compared.

    Raises:
        CalibrationError: The original fails on a batch, or its output is not finite; or the likelihood does not fit the
            outputs or cannot measure.
        WeightError: The output is not finite because weights of the original are not.
    """

    @torch.no_grad()
    def __init__(self, original: nn.Module, batches: Sequence[ExampleInputs], likelihood: object) -> None:
        self._batches = batches
        self.likelihood: Likelihood = resolve_likelihood(likelihood, original, batches)
        self._expected = [run_batch(original, batch) for batch in batches]
        if not all(bool(self.likelihood.divergence(y, y).isfinite().all()) for y in self._expected):
            check_finite_state(original, "the original model")
            raise CalibrationError(
                "the original model's output is NaN or Inf on this data, although its weights are finite, so no "
                "divergence from it can be measured. Drop the samples that give NaN or Inf. If all do, convert a model "
                "in half precision with .float(), or mask with a large number instead of infinity."
            )

    @torch.no_grad()
    def divergences(self, network: nn.Module) -> Tensor:
        """Return the divergence of every sample (n,) of this process, in nats."""
        pairs = zip(self._expected, self._batches, strict=True)
        parts = [self.likelihood.divergence(y, run_batch(network, x)) for y, x in pairs]
        return torch.cat(parts).double().cpu()

    def divergence(self, network: nn.Module) -> float:
        """Return the mean divergence over the samples of this process, in nats."""
        return mean_and_error(self.divergences(network))[0]


def significantly_negative(differences: Tensor, *, everywhere: bool = False) -> bool:
    """Return whether the mean of the values (n,) is below zero by more than two standard errors.

    With ``everywhere``, the mean is over the values of all processes.
    """
    mean, error = mean_and_error(differences, everywhere=everywhere)
    return mean < -_SIGNIFICANT * error


def mean_and_error(values: Tensor, *, everywhere: bool = False) -> tuple[float, float]:
    """Return the mean of the values (n,) and its standard error, which is infinite for a single value.

    With ``everywhere``, the mean is over the values of all processes.
    """
    sums = torch.stack([values.new_tensor(len(values)), values.sum(), values.square().sum()])
    if everywhere:
        all_reduce([sums])
    count, total, squares = sums.tolist()
    mean = total / count
    variance = max(squares / count - mean**2, 0.0)
    return mean, math.sqrt(variance / (count - 1)) if count > 1 else math.inf
