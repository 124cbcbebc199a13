"""Refits the chains of a factorized network in closed form, from its beginning to its end.

Each chain should return the output of its original convolution, on the inputs that it gets in the factorized network.
The last stage of the chain is refitted by least squares. The remaining difference in the mean goes into its bias, or
into the running mean of the batch norm that follows. The running variance stays: a low-rank output has a smaller
variance than the original output, and a new estimate of it would amplify signal and error.
"""

from __future__ import annotations

import math
import time
import weakref
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxfact.calibration import (
    MAX_SEED,
    Batches,
    Transform,
    generator_seed,
    mean_and_error,
    run_batch,
    significantly_negative,
    with_batch_options,
)
from fxfact.capture import ExampleInputs
from fxfact.conv import from_torch, spec_of, to_torch
from fxfact.errors import ArgumentError, check_int
from fxfact.finetune.least_squares import LeastSquaresStats, solve_last_stage
from fxfact.finetune.patches import SAMPLES_AT_ONCE, at_positions, iter_patches
from fxfact.finetune.resumable_run import ResumableRun
from fxfact.finetune.teacher_student import FinetuneResult, TeacherStudent
from fxfact.utils import Progress, copy_with_shared, with_progress

_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class RefitResult(FinetuneResult):
    """What ``fxfact.refit`` did.

    Attributes:
        before: The mean KL divergence from the original on the held-out batches before refitting, in nats per sample.
        after: The same after refitting.
        seconds: How long it took.
        paths: The paths of the chains that were changed.
    """

    paths: tuple[str, ...]

    def _work_done(self) -> str:
        count = len(self.paths)
        return f"{count} chain{'' if count == 1 else 's'} refitted"


@torch.inference_mode(False)
@torch.no_grad()
def refit(
    factorized: _Network,
    original: nn.Module,
    batches: Batches,
    *,
    last_stages: bool = True,
    means: bool = True,
    example_inputs: ExampleInputs | None = None,
    likelihood: object = None,
    transform: Transform | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    progress: Progress = None,
) -> tuple[_Network, RefitResult]:
    """Refit a factorized network to its original, in closed form, without labels and without gradients.

    From the first chain to the last, the last stage is refitted by least squares to the output of the original
    convolution, and a remaining difference in the mean is corrected. Both are damped by two-fold cross-validation, so
    that few samples are enough. Every fourth batch is held out for measuring. If the network got worse there, by more
    than two standard errors, an unchanged copy is returned.

    Convolutions that are no modules, and those that share their weights or their last stages, are not refitted. The
    original runs once over the batches. The factorized network runs once as well if it is a graph module and the
    intermediate values of all batches fit into 1 GiB; otherwise it runs up to each chain. In addition, the outputs of
    all convolutions are stored at 32 positions of every sample. With ``torch.distributed``, each process works alone on
    its own batches: refit in one process and send the result to the others.

    Args:
        factorized: A network that a plan made. It is not changed.
        original: The network that the plan was made for. It is not changed.
        batches: Unlabelled data, at least two batches, as for ``fxfact.plan``.
        last_stages: Whether to refit the last stages' weights.
        means: Whether to correct means, in biases or in the running means of batch norms that follow a convolution
            without bias.
        example_inputs: Arguments of the model, as for ``fxfact.plan``.
        likelihood: How to read the output, as for ``fxfact.plan``.
        transform: Makes of each batch what the model is called with, as for ``fxfact.plan``.
        max_samples: How many samples to take at most, as for ``fxfact.plan``.
        seed: Draws the positions at which outputs are compared.
        progress: True for a progress bar on stderr, False for none, or a callable with tqdm's signature. None shows
            one if stderr is a terminal.

    Returns:
        The refitted copy of ``factorized``, and a report with the divergence before and after.

    Raises:
        ArgumentError: An argument has a value that cannot be used.
        ArgumentTypeError: A network is not a ``torch.nn.Module``.
        CalibrationError: The batches do not fit the network, or outputs cannot be compared.
        CaptureError: A copy of ``factorized`` would lose hooks.
        PlanError: ``factorized`` was not made by a plan, or the plan was made for another network.
        WeightError: A network computes NaN or Inf because of its own weights.
    """
    if not last_stages and not means:
        raise ArgumentError("refit has nothing to do: pass last_stages=True or means=True")
    seed = check_int("seed", seed, 0, MAX_SEED)
    started = time.perf_counter()
    (batches,) = with_batch_options(transform, max_samples, batches=batches)
    networks = TeacherStudent(factorized, original, batches, example_inputs=example_inputs, likelihood=likelihood)
    before = networks.initial_divergences()
    paths = _refit_chains(networks, seed, progress, last_stages=last_stages, means=means)
    after, result = networks.divergences(), cast(_Network, networks.finished())
    ends = [mean_and_error(values)[0] for values in (before, after)]
    if significantly_negative(before - after) or not math.isfinite(ends[1]):
        result, ends, paths = cast(_Network, copy_with_shared(factorized, set())), ends[:1] * 2, ()
    seconds = time.perf_counter() - started
    return result, RefitResult(before=ends[0], after=ends[1], paths=paths, seconds=seconds)


def _refit_chains(
    networks: TeacherStudent, seed: int, progress: Progress, *, last_stages: bool, means: bool
) -> tuple[str, ...]:
    """Refit one chain after the other, and return the paths of those that changed."""
    targets, run = record_targets(networks, seed), ResumableRun(networks.factorized, networks.batches)
    paths: list[str] = []
    for target in with_progress(targets, len(targets), "refitting", progress):
        halves = _collect_stats(networks, run, target, seed)
        if halves and _update_last_stage(networks, target, halves, last_stages=last_stages, means=means):
            paths.append(target.path)
    return tuple(paths)


@dataclass
class RefitTarget:
    """The output of an original convolution, which its chain should return.

    ``outputs`` has, for every batch and every call, the output at some positions: (samples, positions, out).
    ``norm`` is the path of the batch norm whose only input is the convolution's output, if there is one.
    """

    path: str
    outputs: list[list[Tensor]] = field(default_factory=list)
    norm: str | None = None


def record_targets(networks: TeacherStudent, seed: int) -> list[RefitTarget]:
    """Run the original, and return the targets in the order in which the run reaches the convolutions."""
    shared = {path for d in networks.plan if d.tied_to for path in (d.path, d.tied_to)}
    shared |= {d.path for d in networks.plan.rewrites if len(d.stages) - 1 in d.shared_stages}
    convs = {module: RefitTarget(path) for path, module in networks.rewritten.items() if path not in shared}
    norms: dict[nn.Module, str] = {
        module: name for name, module in networks.original.named_modules() if isinstance(module, _BatchNorm)
    }
    reached: dict[str, RefitTarget] = {}
    latest: list[tuple[RefitTarget, weakref.ref[Tensor], int]] = []  # outputs, and how often they were written to
    resized: set[str] = set()  # called with an output_size, so the patches of the last stage are not known
    sources: dict[str, set[str | None]] = {}  # of each norm's inputs: paths of convolutions, None for others

    def after_conv(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        target = reached.setdefault(convs[module].path, convs[module])
        if spec_of(module).order or output.ndim == 2:  # a norm would read another axis than the channels otherwise
            latest.append((target, weakref.ref(output), _write_count(output)))
        calls = target.outputs[-1]
        position_seed = _position_seed(seed, len(target.outputs) - 1, len(calls))
        calls.append(at_positions(spec_of(module), output, position_seed))
        if len(args) > 1 or kwargs.get("output_size") is not None:
            resized.add(target.path)

    def before_norm(module: nn.Module, args: Any) -> None:
        paths = [target.path for target, output, count in latest if args and _is_unchanged(args[0], output(), count)]
        sources.setdefault(norms[module], set()).update(paths or [None])

    handles = [module.register_forward_hook(after_conv, with_kwargs=True) for module in convs]
    handles += [module.register_forward_pre_hook(before_norm) for module in norms]
    for batch in networks.batches:
        for target in convs.values():
            target.outputs.append([])
        run_batch(networks.original, batch)
        latest.clear()
    for handle in handles:
        handle.remove()
    for norm, paths in sources.items():
        if len(paths) == 1 and (path := paths.pop()):
            reached[path].norm = norm
    return [target for path, target in reached.items() if path not in resized]


def _is_unchanged(tensor: Any, output: Tensor | None, count: int) -> bool:
    """Return whether a tensor is the output that was written to ``count`` times, and no more since."""
    return tensor is output and tensor is not None and _write_count(tensor) == count


def _write_count(tensor: Tensor) -> int:
    """Return how often a tensor was written to, which tensors of inference mode do not know."""
    return -1 if tensor.is_inference() else tensor._version


def _position_seed(seed: int, batch: int, call: int) -> int:
    """Return the seed for the positions of one call of a convolution."""
    return generator_seed(seed, (batch << 20) + call)


def _collect_stats(
    networks: TeacherStudent, run: ResumableRun, target: RefitTarget, seed: int
) -> list[LeastSquaresStats] | None:
    """Return the statistics of a chain's last stage in the factorized network, for two halves of the samples.

    There is one half if there are few samples, and none if no input is given. Returns None if the factorized network
    calls the chain less often than the original calls the convolution.
    """
    stage = networks.last_stage(target.path)
    groups, halves = spec_of(stage).groups, list[LeastSquaresStats]()
    number = call = 0

    def on_input(maps: Tensor) -> bool:
        nonlocal call
        outputs = torch.split(target.outputs[number][call], SAMPLES_AT_ONCE)
        for rows in zip(iter_patches(stage, maps, _position_seed(seed, number, call)), outputs, strict=True):
            x, y = (part.reshape(-1, groups, part.shape[-1] // groups).movedim(1, 0) for part in rows)
            if x.shape[1]:
                halves.append(LeastSquaresStats.of(x, y))
            if len(halves) > 2:
                halves[:] = [halves[1], halves[0] + halves[2]]
        call += 1
        return call == len(target.outputs[number])

    for number, outputs in enumerate(target.outputs):
        call = 0
        if outputs and not run.run_until(number, stage, on_input):
            return None
    return halves


def _update_last_stage(
    networks: TeacherStudent, target: RefitTarget, halves: list[LeastSquaresStats], *, last_stages: bool, means: bool
) -> bool:
    """Refit the last stage's weight, and its bias or the batch norm's running mean. Return whether anything changed."""
    stage: Any = networks.last_stage(target.path)
    norm: Any = networks.factorized.get_submodule(target.norm) if target.norm else None
    mean = stage.bias if norm is None or stage.bias is not None else norm.running_mean
    spec = spec_of(stage)
    weight = from_torch(spec, stage.weight)
    shape = (spec.groups, spec.out_channels // spec.groups, -1)
    bias = weight.new_zeros(spec.out_channels) if stage.bias is None else stage.bias
    old = weight.reshape(shape).double(), bias.reshape(shape[:2]).double()
    matrix, bias = solve_last_stage(*old, halves, last_stages=last_stages, means=means and mean is not None)
    if torch.equal(matrix, old[0]) and torch.equal(bias, old[1]):
        return False
    stage.weight.copy_(to_torch(spec, matrix.reshape(weight.shape).to(weight)))
    if mean is not None:
        mean.copy_(bias.flatten() if stage.bias is not None else mean - bias.flatten())
    return True
