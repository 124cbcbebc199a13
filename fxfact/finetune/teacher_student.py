"""An original and the network that was made of it, side by side on the same data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxfact.analysis import prepared, stages_of
from fxfact.calibration import Batches, DivergenceEvaluator, iter_batches, run_batch, split_held_out
from fxfact.capture import ExampleInputs, check_kept_by_copies
from fxfact.conv import is_conv, spec_of, torch_conv_class
from fxfact.errors import ArgumentTypeError, PlanError
from fxfact.graph import get_tensor
from fxfact.passes import last_plan
from fxfact.planning import Decision, Plan
from fxfact.utils import copy_with_shared, to_eval


@dataclass(frozen=True, kw_only=True)
class FinetuneResult(ABC):
    """What brought a network nearer to its original: the divergence on held-out batches ``before`` and ``after``, in
    nats for one sample, and how many ``seconds`` it took.
    """

    before: float
    after: float
    seconds: float

    def __str__(self) -> str:
        ends = f"{self.before:.4g} → {self.after:.4g} nats from the original, on held-out batches"
        return f"{self._done()} in {self.seconds:.1f} s: {ends}"

    @abstractmethod
    def _done(self) -> str:
        """How much of what."""


class TeacherStudent:
    """Copies of both in evaluation mode, ``factorized`` one to be changed, and ``batches`` without those held out.

    ``plan`` is the one that made the network; ``also`` gives what is measured on beside the batches held out, of each.
    Raises ArgumentTypeError, CalibrationError, CaptureError, PlanError.
    """

    def __init__(
        self,
        factorized: nn.Module,
        original: nn.Module,
        batches: Batches,
        *,
        example_inputs: ExampleInputs | None,
        likelihood: object,
        also: Callable[[ExampleInputs], ExampleInputs] | None = None,
    ) -> None:
        for name, network in (("factorized", factorized), ("original", original)):
            if not isinstance(network, nn.Module):
                raise ArgumentTypeError(f"{name} must be a torch.nn.Module, got {type(network).__name__}")
        check_kept_by_copies(factorized)
        self.plan: Plan = last_plan(factorized)
        self.original, self.factorized = to_eval(prepared(original, self.plan)), copy_with_shared(factorized, set())
        self._modes = {name: module.training for name, module in self.factorized.named_modules()}
        self.factorized.eval()
        modules = dict(self.original.named_modules())
        there = [
            decision for decision in self.plan.rewrites if _is_there(decision, modules, self.plan.inference_passes)
        ]
        self.rewritten = {decision.path: modules[decision.path] for decision in there}
        self._last_stages = {decision.path: stages_of(self.factorized, decision)[-1] for decision in there}
        self.batches, held_out = split_held_out(list(iter_batches(self.original, batches, example_inputs)))
        others = [also(batch) for batch in held_out] if also else []
        self._held_out = DivergenceEvaluator(self.original, [*held_out, *others], likelihood)

    def distances(self, batch: ExampleInputs) -> Tensor:
        """Of the factorized network's output from the original's, by sample (n,), to be learned from."""
        with torch.no_grad():
            wanted = run_batch(self.original, batch)
        known = self._held_out
        return known.likelihood.distance(wanted, run_batch(self.factorized, batch), known.variance)

    def divergences(self) -> Tensor:
        """Of every sample held out (n,)."""
        return self._held_out.divergences(self.factorized)

    def divergence(self) -> float:
        """The mean over the samples held out."""
        return self._held_out.divergence(self.factorized)

    def finished(self) -> nn.Module:
        """The factorized network, in the modes of the one that was given."""
        for name, module in self.factorized.named_modules():
            module.training = self._modes[name]
        return self.factorized

    def last_stage(self, path: str) -> nn.Module:
        """The last of the stages that took a convolution's place."""
        return self._last_stages[path]


def _is_there(decision: Decision, modules: dict[str, nn.Module], form: tuple[str, ...]) -> bool:
    """Whether the convolution that was rewritten is a module whose output is the convolution's.

    Raises PlanError where it is another one.
    """
    module = modules.get(decision.path)
    if module is None and get_tensor(modules[""], decision.path) is None:
        raise PlanError(f"{decision.path}: the plan is of a convolution here. Pass the network that it was made of.")
    if module is None or not is_conv(module):
        return False
    kind = type(module)
    plain = torch_conv_class(kind)
    if any(getattr(kind, name, None) is not getattr(plain, name, None) for name in ("forward", "_conv_forward")):
        return False
    found, planned = spec_of(module), decision.spec
    assert planned is not None
    if found != (replace(planned, bias=found.bias) if form else planned):  # folding gives biases
        raise PlanError(
            f"{decision.path}: the plan is of {decision.spec}, the original has {found}. Pass that original."
        )
    return True
