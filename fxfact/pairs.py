"""An original and the network that was made of it, side by side on the same data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxfact.calibration import Batches, arguments_for, dense_of, held_out_of, likelihood_for
from fxfact.capture import ExampleInputs, arguments_of
from fxfact.copying import private_copy
from fxfact.errors import ArgumentTypeError
from fxfact.passes import last_plan
from fxfact.planning import Plan


class Pair:
    """Copies of both in evaluation mode, ``factorized`` one to be changed, and ``batches`` without those ``held_out``.

    ``plan`` is the one that made the network. Raises ArgumentTypeError, CalibrationError, PlanError.
    """

    def __init__(
        self,
        factorized: nn.Module,
        original: nn.Module,
        batches: Batches,
        *,
        example_inputs: ExampleInputs | None,
        likelihood: object,
    ) -> None:
        if not isinstance(original, nn.Module):
            raise ArgumentTypeError(f"original must be a torch.nn.Module, got {type(original).__name__}")
        self.plan: Plan = last_plan(factorized)
        self.original, self.factorized = private_copy(original).eval(), copy.deepcopy(factorized)
        self._modes = {name: module.training for name, module in self.factorized.named_modules()}
        self.factorized.eval()
        self.batches, self.held_out = held_out_of(list(arguments_for(self.original, batches, example_inputs)))
        with torch.no_grad():
            self.likelihood = likelihood_for(likelihood, run(self.original, self.batches[0]))

    def outputs(self, batch: ExampleInputs) -> tuple[Any, Any]:
        """Of the original, without gradients, and of the factorized network."""
        with torch.no_grad():
            wanted = run(self.original, batch)
        return wanted, run(self.factorized, batch)

    def divergences(self, batch: ExampleInputs) -> Tensor:
        """Of the factorized network's output from the original's, by sample (n,), in nats."""
        wanted, given = self.outputs(batch)
        return self.likelihood.divergence(wanted, given, _variance(wanted))

    @torch.no_grad()
    def divergence(self) -> float:
        """The mean over the samples held out."""
        return float(torch.cat([self.divergences(batch) for batch in self.held_out]).mean())

    def finished(self) -> nn.Module:
        """The factorized network, in the modes of the one that was given."""
        for name, module in self.factorized.named_modules():
            module.training = self._modes[name]
        return self.factorized

    def rewritten(self) -> dict[str, nn.Module]:
        """By path the convolutions of the original, in the plan's order, that are modules and were rewritten."""
        modules = dict(self.original.named_modules())
        return {decision.path: modules[decision.path] for decision in self.plan.rewrites if decision.path in modules}

    def last_stage(self, path: str) -> nn.Module:
        """The last of the stages that took a convolution's place."""
        *_, last = self.factorized.get_submodule(path).children()
        return last


def run(network: nn.Module, batch: ExampleInputs) -> Any:
    """The network's output for a batch."""
    args, kwargs = arguments_of(batch)
    return network(*args, **kwargs)


def _variance(output: Any) -> float:
    """Of all numbers of an output."""
    numbers: Sequence[Tensor] = [tensor.detach().double().flatten() for tensor in dense_of(output)]
    return float(torch.cat(list(numbers)).var(correction=0))
