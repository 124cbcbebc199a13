"""An original network and a factorized one, run side by side on the same data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxfact.analysis import prepare_original, stages_of, update_kernel_errors
from fxfact.calibration import Batches, DivergenceEvaluator, iter_batches, run_batch, split_held_out
from fxfact.capture import ExampleInputs, check_kept_by_copies
from fxfact.conv import is_conv, spec_of, torch_conv_class
from fxfact.errors import ArgumentTypeError, PlanError
from fxfact.graph import get_tensor
from fxfact.passes import last_plan
from fxfact.planning import Decision, Plan
from fxfact.utils import check_finite_state, copy_with_shared, to_eval


@dataclass(frozen=True, kw_only=True)
class FinetuneResult(ABC):
    """How much closer a factorized network came to its original.

    Attributes:
        before: The mean KL divergence from the original on the held-out batches before the call, in nats per sample.
        after: The same after the call.
        seconds: How long the call took.
    """

    before: float
    after: float
    seconds: float

    def __str__(self) -> str:
        change = f"{self.before:.4g} → {self.after:.4g} nats per sample from the original, on held-out batches"
        return f"{self._work_done()} in {self.seconds:.1f} s: {change}"

    @abstractmethod
    def _work_done(self) -> str:
        """Say what was done, and how often."""


class TeacherStudent:
    """Copies of an original (the teacher) and of the network factorized from it (the student), in evaluation mode.

    Args:
        factorized: The factorized network. Its copy may be changed.
        original: The network that ``factorized`` was made from.
        batches: Batches for both. Every fourth is held out for measuring.
        example_inputs: Arguments of the model, as in ``fxfact.plan``.
        likelihood: How to read the output, as in ``fxfact.plan``.
        augment_held_out: Changes a held-out batch. The divergence is then measured on the changed batches as well.

    Attributes:
        plan: The plan that made ``factorized``.
        original: The copy of the original.
        factorized: The copy of the factorized network.
        batches: The batches that are not held out.
        rewritten: The rewritten convolutions of the original that are modules, by path.

    Raises:
        ArgumentTypeError: A network is not a module.
        CalibrationError: The batches do not fit, or the outputs cannot be compared.
        CaptureError: Copies of ``factorized`` would lose hooks.
        PlanError: No plan made ``factorized``, or the plan was made for another network than ``original``.
    """

    def __init__(
        self,
        factorized: nn.Module,
        original: nn.Module,
        batches: Batches,
        *,
        example_inputs: ExampleInputs | None,
        likelihood: object,
        augment_held_out: Callable[[ExampleInputs], ExampleInputs] | None = None,
    ) -> None:
        for name, network in (("factorized", factorized), ("original", original)):
            if not isinstance(network, nn.Module):
                raise ArgumentTypeError(f"{name} must be a torch.nn.Module, got {type(network).__name__}")
        check_kept_by_copies(factorized)
        self.plan: Plan = last_plan(factorized)
        self.original = to_eval(prepare_original(original, self.plan))
        self.factorized = copy_with_shared(factorized, set())
        self._modes = {name: module.training for name, module in self.factorized.named_modules()}
        self.factorized.eval()
        modules = dict(self.original.named_modules())
        comparable = [
            decision
            for decision in self.plan.rewrites
            if _is_plain_module(decision, modules, biases_added=bool(self.plan.inference_passes))
        ]
        self.rewritten = {decision.path: modules[decision.path] for decision in comparable}
        self._last_stages = {decision.path: stages_of(self.factorized, decision)[-1] for decision in comparable}
        self.batches, held_out = split_held_out(list(iter_batches(self.original, batches, example_inputs)))
        augmented = [augment_held_out(batch) for batch in held_out] if augment_held_out else []
        request = likelihood or self.plan.outputs or None
        self._held_out = DivergenceEvaluator(self.original, [*held_out, *augmented], request)

    def training_losses(self, batch: ExampleInputs) -> Tensor:
        """Return the loss between both outputs for each sample (n,), with gradients for the factorized network."""
        with torch.no_grad():
            expected = run_batch(self.original, batch)
        return self._held_out.likelihood.training_loss(expected, run_batch(self.factorized, batch))

    def divergences(self) -> Tensor:
        """Return the KL divergence of every held-out sample (n,), in nats."""
        return self._held_out.divergences(self.factorized)

    def initial_divergences(self) -> Tensor:
        """Return ``divergences`` before the factorized network is changed.

        Raises WeightError if they are NaN or Inf because of its own tensors.
        """
        found = self.divergences()
        if not bool(found.isfinite().all()):
            check_finite_state(self.factorized, "the factorized network")
        return found

    def divergence(self) -> float:
        """Return the mean KL divergence over the held-out samples, in nats."""
        return self._held_out.divergence(self.factorized)

    def finished(self) -> nn.Module:
        """Return the factorized network, with the training modes of the one that was passed in.

        The errors that its kernels have now are recorded, for ``fxfact.inspect``.
        """
        update_kernel_errors(self.factorized, self.original)
        for name, module in self.factorized.named_modules():
            module.training = self._modes[name]
        return self.factorized

    def last_stage(self, path: str) -> nn.Module:
        """Return the last stage of the chain that replaced the convolution at ``path``."""
        return self._last_stages[path]


def _is_plain_module(decision: Decision, modules: dict[str, nn.Module], *, biases_added: bool) -> bool:
    """Return whether the original's convolution is a module that returns nothing but the convolution's output.

    ``biases_added`` says that inference passes ran before the plan was made; folding batch norms adds biases.
    Raises PlanError if the original has another convolution than the plan.
    """
    module = modules.get(decision.path)
    if module is None and get_tensor(modules[""], decision.path) is None:
        raise PlanError(
            f"{decision.path}: the plan rewrites a convolution here, but the original has none. Pass the network that "
            "the plan was made for."
        )
    if module is None or not is_conv(module):
        return False
    own_class = type(module)
    torch_class = torch_conv_class(own_class)
    if any(getattr(own_class, m, None) is not getattr(torch_class, m, None) for m in ("forward", "_conv_forward")):
        return False
    found, planned = spec_of(module), decision.spec
    assert planned is not None
    if found != (replace(planned, bias=found.bias) if biases_added else planned):
        raise PlanError(
            f"{decision.path}: the plan was made for {decision.spec}, but the original has {found}. Pass the network "
            "that the plan was made for."
        )
    return True
