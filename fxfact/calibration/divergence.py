"""How far networks are from their original, on some batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxfact.calibration.batches import run_batch
from fxfact.calibration.collect import all_reduce, moments_of, variance_of
from fxfact.calibration.outputs import Likelihood, float_tensors_of, likelihood_for
from fxfact.capture import ExampleInputs
from fxfact.errors import CalibrationError

_CLEARLY = 2.0  # standard errors


class DivergenceEvaluator:
    """Batches, and what the original, in evaluation mode, gives for them, to measure others by.

    ``variance`` is that of the output, by which differences of numbers are judged. Raises CalibrationError where the
    original fails on a batch, or its output does not say what its loss is, and for a likelihood that does not measure.
    """

    @torch.no_grad()
    def __init__(self, original: nn.Module, batches: Sequence[ExampleInputs], likelihood: object) -> None:
        self._batches = batches
        self._expected = [run_batch(original, batch) for batch in batches]
        self.likelihood: Likelihood = likelihood_for(likelihood, self._expected[0])
        self.variance = variance_of(torch.stack([moments_of(float_tensors_of(y)) for y in self._expected]).sum(dim=0))
        if not all(map(self._is_measured, self._expected)):
            raise CalibrationError(
                "the model's own output is NaN or Inf on this data, from which nothing is near or far. Repair or drop "
                "the data, or mask with a large number."
            )

    def _is_measured(self, output: Any) -> bool:
        return bool(self.likelihood.divergence(output, output, self.variance).isfinite().all())

    @torch.no_grad()
    def divergences(self, network: nn.Module) -> Tensor:
        """From the original, in nats, of every sample (n,) of this process."""
        pairs = zip(self._expected, self._batches, strict=True)
        parts = [self.likelihood.divergence(y, run_batch(network, x), self.variance) for y, x in pairs]
        return torch.cat(parts).double().cpu()

    def divergence(self, network: nn.Module) -> float:
        """Their mean over the samples of this process."""
        return mean_and_error(self.divergences(network))[0]


def significantly_negative(differences: Tensor, *, everywhere: bool = False) -> bool:
    """Whether the mean of the values (n,) is, by more than may be chance: two standard errors; ``everywhere``: of those
    of every process.
    """
    mean, error = mean_and_error(differences, everywhere=everywhere)
    return mean < -_CLEARLY * error


def mean_and_error(values: Tensor, *, everywhere: bool = False) -> tuple[float, float]:
    """The mean of the values (n,), and its standard error, infinite where there is one alone; ``everywhere``: of those
    of every process.
    """
    sums = torch.stack([values.new_tensor(len(values)), values.sum(), values.square().sum()])
    if everywhere:
        all_reduce([sums])
    count, total, squares = sums.tolist()
    mean = total / count
    variance = max(squares / count - mean**2, 0.0)
    return mean, math.sqrt(variance / (count - 1)) if count > 1 else math.inf
