"""A short recovery without labels: the factorized network learns from its original what it did on the same data."""

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

from fxfact.calibration import MAX_SEED, Batches
from fxfact.capture import ExampleInputs
from fxfact.errors import ArgumentError, check_int
from fxfact.finetune.teacher_student import FinetuneResult, TeacherStudent
from fxfact.utils import Progress, warn_caller, with_progress

_Network = TypeVar("_Network", bound=nn.Module)
Augment = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class DistillResult(FinetuneResult):
    """What ``recover`` did, in how many ``steps``."""

    steps: int

    def _done(self) -> str:
        return f"{self.steps} steps"


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
    patience: int = 20,
    seed: int = 0,
    progress: Progress = False,
) -> tuple[_Network, DistillResult]:
    """A trained copy of a factorized network, and what the training did. The networks given are not changed.

    Distillation (Hinton, Vinyals and Dean 2015) on ``batches``, without labels: the copy is to give what the original
    gives, at the output (of logits at temperature 4) and behind every rewritten convolution that is a module of the
    original (relative squares, after Romero et al. 2015). AdamW, its rate ``lr`` falling along a cosine over ``steps``,
    or sooner, over ``seconds``; in evaluation mode, so that batch norms stay what they are. Every fourth batch is held
    out and looked at after every pass over the others, ten times at least; the best state is what comes back, and
    ``patience`` looks without a gain end it. ``augment`` is called on the floating-point tensors of a training batch
    (random flips, shifts); the original sees the same. With ``mixup`` the samples of these tensors are drawn towards
    each other (Zhang et al. 2018), and what is held out is looked at in both ways: for an original that was trained on
    these very samples, of which it says little but their labels. Without an end by ``seconds``, and with an ``augment``
    that is, deterministic by ``seed``. Batches, ``example_inputs``, ``likelihood`` and ``progress`` are as for
    ``fxfact.plan``. Of several processes each works alone, as in ``refit``.
    Raises ArgumentError, ArgumentTypeError, CalibrationError, PlanError.
    """
    steps, patience, seed = (
        check_int("steps", steps, 1),
        check_int("patience", patience, 1),
        check_int("seed", seed, 0, MAX_SEED),
    )
    for name, number in (("seconds", seconds), ("lr", lr)):
        if not isinstance(number, Real) or not number > 0 or (name == "lr" and math.isinf(number)):
            raise ArgumentError(f"{name} must be a positive number, got {number!r}")
    mix = _Mixup(seed) if mixup else None
    pair = TeacherStudent(factorized, original, batches, example_inputs=example_inputs, likelihood=likelihood, also=mix)
    trained = _trainable(pair.factorized)
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
    best = _Best(pair.factorized, pair.divergence())
    looks = max(1, min(steps // 10, len(pair.batches)))
    order, started, before = torch.Generator().manual_seed(seed), time.perf_counter(), best.divergence
    step = 0
    with _Distillation(pair) as distillation:
        for step in with_progress(range(1, steps + 1), steps, "distilling", progress):
            share = max(step / steps, (time.perf_counter() - started) / seconds)
            for group in optimizer.param_groups:
                group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * min(1.0, share))) * min(1.0, step / 20)
            number = int(torch.randint(len(pair.batches), (), generator=order, device="cpu"))
            batch = _augmented(pair.batches[number], augment)
            optimizer.zero_grad()
            torch.autograd.backward(distillation.loss(mix(batch) if mix else batch))
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            last = share >= 1.0 or step == steps
            if last or step % looks == 0:
                best.look(pair.divergence())
            if last or best.since >= patience:
                break
    if not math.isfinite(best.latest):
        warn_caller(
            "in training the network became NaN or Inf on the held-out batches; what was best before comes back. "
            "Lower lr, or see whether augment gives NaN.",
        )
    best.restore()
    taken = DistillResult(before=before, after=best.divergence, steps=step, seconds=time.perf_counter() - started)
    return cast(_Network, pair.finished()), taken


def _trainable(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients. Raises ArgumentError for none, and for half precision."""
    found = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not found or any(parameter.dtype == torch.float16 for parameter in found):
        raise ArgumentError(
            "distill trains the parameters that require gradients, in float32, float64 or bfloat16; the network has "
            f"{'float16 ones' if found else 'none'}. Convert it with .float(), or set requires_grad."
        )
    return found


class _Distillation:
    """What a pair computes behind every rewritten convolution, kept while it lasts."""

    def __init__(self, pair: TeacherStudent) -> None:
        self._pair = pair
        self._features: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> _Distillation:
        for path, conv in self._pair.rewritten.items():
            for module, features in zip((conv, self._pair.last_stage(path)), self._features, strict=True):
                self._handles.append(module.register_forward_hook(_keeping(features, path)))
        return self

    def __exit__(self, *raised: object) -> None:
        for handle in self._handles:
            handle.remove()

    def loss(self, batch: ExampleInputs) -> Tensor:
        """To be minimised: distance of the outputs, and the mean of the features' relative squares. Raises
        ArgumentError where it has no gradient.
        """
        for features in self._features:
            features.clear()
        distance = self._pair.distances(batch).mean()
        both = self._features[0].keys() & self._features[1].keys()  # what was called, in both
        squares = [_relative(*(features[path] for features in self._features)) for path in sorted(both)]
        loss = distance + torch.stack(squares).mean() if squares else distance
        if not loss.requires_grad:
            raise ArgumentError(
                "distill: no gradient leads from the output to the parameters: forward runs without gradients, or "
                "detaches its output. Take that out, or use refit, which needs none."
            )
        return loss


@dataclass
class _Best:
    """The best state so far, and how many looks ago that was."""

    network: nn.Module
    divergence: float
    since: int = 0
    latest: float = 0.0
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = self._now()

    def look(self, divergence: float) -> None:
        """Keep the present state if it is better."""
        self.latest = divergence
        if divergence < self.divergence:
            self.divergence, self.state, self.since = divergence, self._now(), 0
        else:
            self.since += 1

    def restore(self) -> None:
        """Put the best state back."""
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(self.state[name])
        self.network.zero_grad()

    def _now(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.network.named_parameters()}


def _keeping(features: dict[str, Tensor], path: str) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        features[path] = output.clone()  # which what comes next may write to

    return keep


def _relative(wanted: Tensor, given: Tensor) -> Tensor:
    wanted, given = wanted.float(), given.float()
    square = wanted.square().mean().clamp_min(torch.finfo(wanted.dtype).tiny)
    return (given - wanted).square().mean() / square


def _augmented(batch: ExampleInputs, augment: Augment | None) -> ExampleInputs:
    def changed(value: Tensor) -> Tensor:
        try:
            return augment(value.clone()) if augment else value
        except Exception as error:
            raise ArgumentError(f"augment fails on a tensor {tuple(value.shape)} of a batch: {error!r}") from error

    return _with_floats(batch, changed)


class _Mixup:
    """Draws every sample of a batch towards another one of it, by a share between 0 and 1."""

    def __init__(self, seed: int) -> None:
        self._draw = torch.Generator().manual_seed(seed)

    def __call__(self, batch: ExampleInputs) -> ExampleInputs:
        sizes = [len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
        if not sizes:
            return batch
        drawn: Any = {"generator": self._draw, "device": "cpu"}
        shares, others = torch.rand(sizes[0], **drawn), torch.randperm(sizes[0], **drawn)

        def mixed(value: Tensor) -> Tensor:
            if value.shape[:1] != shares.shape:
                return value
            by_sample = shares.to(value).reshape(-1, *[1] * (value.ndim - 1))
            return torch.lerp(value, value[others.to(value.device)], by_sample)

        return _with_floats(batch, mixed)


def _with_floats(batch: ExampleInputs, change: Callable[[Tensor], Tensor]) -> ExampleInputs:
    """A batch with its floating-point tensors changed."""

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    found: ExampleInputs = tree_map(changed, batch)
    return found
