"""How far a network is from its original on batches that neither has learned from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fxfact.calibration.batches import run_batch
from fxfact.calibration.collecting import all_reduce
from fxfact.calibration.likelihood import Likelihood, dense_of, likelihood_for
from fxfact.capture import ExampleInputs
from fxfact.errors import CalibrationError


class HeldOut:
    """Batches to measure on, and what the original, in evaluation mode, gives for them.

    ``variance`` is that of the output, by which differences of numbers are judged. Raises CalibrationError where the
    original fails on a batch, or its output does not say what its loss is, and for a likelihood that does not measure.
    """

    @torch.no_grad()
    def __init__(self, original: nn.Module, batches: Sequence[ExampleInputs], likelihood: object) -> None:
        self._batches = batches
        self._expected = [run_batch(original, batch) for batch in batches]
        self.likelihood: Likelihood = likelihood_for(likelihood, self._expected[0])
        numbers = [tensor.double().flatten() for output in self._expected for tensor in dense_of(output)]
        self.variance = float(torch.cat(numbers).var(correction=0))
        if not all(map(self._is_measured, self._expected)):
            raise CalibrationError(
                "the model's own output is NaN or Inf on this data, from which nothing is near or far. Repair or drop "
                "the data, or mask with a large number."
            )

    def _is_measured(self, output: Any) -> bool:
        return bool(self.likelihood.divergence(output, output, self.variance).isfinite().all())

    @torch.no_grad()
    def divergence(self, network: nn.Module) -> float:
        """The mean divergence from the original, in nats for one sample, over the samples of every process."""
        pairs = zip(self._expected, self._batches, strict=True)
        parts = [self.likelihood.divergence(y, run_batch(network, x), self.variance) for y, x in pairs]
        sums = torch.stack([torch.cat(parts).double().sum().cpu(), torch.tensor(sum(map(len, parts))).double()])
        all_reduce([sums])
        return float(sums[0] / sums[1])
