"""Trains a factorized network without labels: it learns the outputs and features of its original."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from fxfact.calibration import MAX_SEED, Batches, Transform, mean_and_error, with_batch_options
from fxfact.capture import ExampleInputs
from fxfact.errors import ArgumentError, CalibrationError, check_int
from fxfact.finetune.teacher_student import FinetuneResult, TeacherStudent
from fxfact.utils import Progress, warn_caller, with_progress

_Network = TypeVar("_Network", bound=nn.Module)
Augment = Callable[[Tensor], Tensor]
_WARMUP_STEPS = 20
_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class DistillResult(FinetuneResult):
    """What ``fxfact.distill`` did.

    Attributes:
        before: The mean KL divergence from the original on the held-out batches before training, in nats per sample.
        after: The same for the returned network.
        seconds: How long it took.
        steps: The number of training steps.
    """

    steps: int

    def _work_done(self) -> str:
        return f"{self.steps} step{'' if self.steps == 1 else 's'}"


@torch.inference_mode(False)
@torch.enable_grad()
def distill(
    factorized: _Network,
    original: nn.Module,
    batches: Batches,
    *,
    steps: int = 1000,
    seconds: float = math.inf,
    lr: float = 1e-4,
    augment: Augment | None = None,
    mixup: bool = False,
    example_inputs: ExampleInputs | None = None,
    likelihood: object = None,
    transform: Transform | None = None,
    max_samples: int | None = None,
    patience: int = 20,
    seed: int = 0,
    progress: Progress = None,
) -> tuple[_Network, DistillResult]:
    """Train a factorized network to behave like its original, without labels.

    This is distillation (Hinton, Vinyals and Dean 2015). The loss compares the outputs (logits at temperature 4), and
    the features after every rewritten convolution that is a module of the original, by their relative squared
    difference (after Romero et al. 2015). The optimizer is AdamW with a cosine schedule. Both networks run in
    evaluation mode, so batch norms keep their statistics.

    Every fourth batch is held out. The divergence there is measured after every pass over the other batches, and at
    least ten times. The best state is returned.

    The result is deterministic, unless ``seconds`` ends the training or ``augment`` is random. With
    ``torch.distributed``, each process works alone on its own batches, as in ``fxfact.refit``.

    Args:
        factorized: A network that a plan made. It is not changed.
        original: The network that the plan was made for. It is not changed.
        batches: Unlabelled data, at least two batches, as for ``fxfact.plan``.
        steps: The number of training steps, one batch each.
        seconds: Ends the training after this time. The learning rate then falls accordingly faster.
        lr: The largest learning rate.
        augment: Called on each floating-point tensor of a training batch, for example to flip or shift images. The
            original gets the same tensors.
        mixup: Whether to replace each sample by a random mixture with another one of its batch (Zhang et al. 2018). Use
            it if ``batches`` are the samples that the original was trained on, because its outputs for them say little
            more than their labels. The divergence is then measured on held-out batches and on mixtures of them.
        example_inputs: Arguments of the model, as for ``fxfact.plan``.
        likelihood: How to read the output, as for ``fxfact.plan``.
        transform: Makes of each batch what the model is called with, as for ``fxfact.plan``.
        max_samples: How many samples to take at most, as for ``fxfact.plan``.
        patience: Ends the training after this many measurements without improvement.
        seed: Draws the order of batches and the mixtures.
        progress: True for a progress bar on stderr, False for none, or a callable with tqdm's signature. None shows
            one if stderr is a terminal.

    Returns:
        The trained copy of ``factorized``, and a report with the divergence before and after.

    Raises:
        ArgumentError: An argument has a value that cannot be used, or the network has no parameters that can be
            trained.
        ArgumentTypeError: A network is not a ``torch.nn.Module``.
        CalibrationError: The batches do not fit the network, or outputs cannot be compared.
        CaptureError: A copy of ``factorized`` would lose hooks.
        PlanError: ``factorized`` was not made by a plan, or the plan was made for another network.
        WeightError: A network computes NaN or Inf because of its own weights.
    """
    steps, patience = check_int("steps", steps, 1), check_int("patience", patience, 1)
    seed = check_int("seed", seed, 0, MAX_SEED)
    for name, number in (("seconds", seconds), ("lr", lr)):
        if not isinstance(number, Real) or not number > 0 or (name == "lr" and math.isinf(number)):
            raise ArgumentError(f"{name} must be a positive number, got {number!r}")
    mix = _Mixup(seed) if mixup else None
    (batches,) = with_batch_options(transform, max_samples, batches=batches)
    networks = TeacherStudent(
        factorized,
        original,
        batches,
        example_inputs=example_inputs,
        likelihood=likelihood,
        augment_held_out=mix,
    )
    trained = _trainable_parameters(networks.factorized)
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
    best = _BestState(networks.factorized, _initial_divergence(networks))
    interval = max(1, min(steps // 10, len(networks.batches)))  # steps between measurements
    order, started, before = torch.Generator().manual_seed(seed), time.perf_counter(), best.divergence
    step = 0
    with _DistillationLoss(networks) as loss:
        for step in with_progress(range(1, steps + 1), steps, "distilling", progress):
            done = max(step / steps, (time.perf_counter() - started) / seconds)
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(lr, step, done)
            number = int(torch.randint(len(networks.batches), (), generator=order, device="cpu"))
            batch = _augmented(networks.batches[number], augment)
            optimizer.zero_grad()
            torch.autograd.backward(loss(mix(batch) if mix else batch))
            nn.utils.clip_grad_norm_(trained, _MAX_GRADIENT_NORM)
            optimizer.step()
            is_last = done >= 1.0 or step == steps
            if is_last or step % interval == 0:
                best.update(networks.divergence())
            if is_last or best.measurements_since >= patience:
                break
    best.restore()
    result = DistillResult(before=before, after=best.divergence, steps=step, seconds=time.perf_counter() - started)
    return cast(_Network, networks.finished()), result


def _initial_divergence(networks: TeacherStudent) -> float:
    """Return the divergence before training. Raises WeightError or CalibrationError if it is NaN or Inf."""
    divergence = mean_and_error(networks.initial_divergences())[0]
    if not math.isfinite(divergence):
        raise CalibrationError(
            "the factorized network's output is NaN or Inf on the held-out batches, although its weights are finite. "
            "If it is in half precision, convert both networks with .float() before training."
        )
    return divergence


def _learning_rate(lr: float, step: int, done: float) -> float:
    """Return the learning rate after a share ``done`` of the training: linear warm-up, then a cosine."""
    return lr * (0.5 + 0.5 * math.cos(math.pi * min(1.0, done))) * min(1.0, step / _WARMUP_STEPS)


def _trainable_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require gradients. Raises ArgumentError for none, and for half precision."""
    found = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not found or any(parameter.dtype == torch.float16 for parameter in found):
        raise ArgumentError(
            "distill trains the parameters that require gradients, in float32, float64 or bfloat16, but the network "
            f"has {'float16 ones' if found else 'none'}. Convert it with .float(), or set requires_grad."
        )
    return found


class _DistillationLoss:
    """The distillation loss of a batch. While it is entered, it records the features of both networks."""

    def __init__(self, networks: TeacherStudent) -> None:
        self._networks = networks
        self._features: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})  # of the original, of the factorized
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> _DistillationLoss:
        for path, conv in self._networks.rewritten.items():
            modules = (conv, self._networks.last_stage(path))
            for module, features in zip(modules, self._features, strict=True):
                self._handles.append(module.register_forward_hook(_feature_hook(features, path)))
        return self

    def __exit__(self, *raised: object) -> None:
        for handle in self._handles:
            handle.remove()

    def __call__(self, batch: ExampleInputs) -> Tensor:
        """Return the loss between the outputs, plus the mean loss between features.

        Raises ArgumentError if the loss has no gradient.
        """
        for features in self._features:
            features.clear()
        output_loss = self._networks.training_losses(batch).mean()
        paths = sorted(self._features[0].keys() & self._features[1].keys())
        feature_losses = [_relative_square(*(features[path] for features in self._features)) for path in paths]
        loss = output_loss + torch.stack(feature_losses).mean() if feature_losses else output_loss
        if not loss.requires_grad:
            raise ArgumentError(
                "distill: no gradient flows from the output to the parameters, because forward() runs without "
                "gradients or detaches its output. Remove that, or use refit, which needs no gradients."
            )
        return loss


@dataclass
class _BestState:
    """The best parameters so far, and the number of measurements since then."""

    network: nn.Module
    divergence: float
    measurements_since: int = 0
    latest: float = 0.0
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = self._current_state()

    def update(self, divergence: float) -> None:
        """Keep the current parameters if their divergence is the best so far."""
        self.latest = divergence
        if divergence < self.divergence:
            self.divergence, self.state, self.measurements_since = divergence, self._current_state(), 0
        else:
            self.measurements_since += 1

    def restore(self) -> None:
        """Put the best parameters back. Warn if the latest ones gave NaN or Inf."""
        if not math.isfinite(self.latest):
            warn_caller(
                "the network became NaN or Inf on the held-out batches during training. The best state before that is "
                "returned. Lower lr, or check whether augment returns NaN."
            )
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(self.state[name])
        self.network.zero_grad()

    def _current_state(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._trained()}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.network.named_parameters() if parameter.requires_grad]


def _feature_hook(features: dict[str, Tensor], path: str) -> Callable[[nn.Module, Any, Any], None]:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        features[path] = output.clone()  # the next operation may write to the output

    return record


def _relative_square(expected: Tensor, found: Tensor) -> Tensor:
    """Return ‖found − expected‖² / ‖expected‖²."""
    expected, found = expected.float(), found.float()
    square = expected.square().mean().clamp_min(torch.finfo(expected.dtype).tiny)
    return (found - expected).square().mean() / square


def _augmented(batch: ExampleInputs, augment: Augment | None) -> ExampleInputs:
    """Return the batch with ``augment`` applied to copies of its floating-point tensors."""

    def changed(value: Tensor) -> Tensor:
        try:
            return augment(value.clone()) if augment else value
        except Exception as error:
            raise ArgumentError(f"augment fails on a tensor {tuple(value.shape)} of a batch: {error!r}") from error

    return _map_float_tensors(batch, changed)


class _Mixup:
    """Mixes every sample of a batch with another one of the batch, by a random share between 0 and 1."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: ExampleInputs) -> ExampleInputs:
        sizes = [len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
        if not sizes:
            return batch
        options: Any = {"generator": self._generator, "device": "cpu"}
        shares, others = torch.rand(sizes[0], **options), torch.randperm(sizes[0], **options)

        def mixed(value: Tensor) -> Tensor:
            if value.shape[:1] != shares.shape:
                return value
            by_sample = shares.to(value).reshape(-1, *[1] * (value.ndim - 1))
            return torch.lerp(value, value[others.to(value.device)], by_sample)

        return _map_float_tensors(batch, mixed)


def _map_float_tensors(batch: ExampleInputs, change: Callable[[Tensor], Tensor]) -> ExampleInputs:
    """Return the batch with a function applied to its floating-point tensors."""

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    found: ExampleInputs = tree_map(changed, batch)
    return found
