"""Repairs in closed form: every chain is made to give what its convolution gave, on the inputs that it really gets.

From the beginning of the factorized network to its end: the last stage of a chain is refit by least squares, and what
is left of a difference in the mean goes into its bias, or into the mean of the batch norm behind it. (A projection has
a smaller variance than what it projects, and rightly so: that of a batch norm stays. Estimated anew, it would scale
signal and error up.)
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

from fxfact.calibration import MAX_SEED, Batches, mean_and_error, run_batch, significantly_negative
from fxfact.capture import ExampleInputs
from fxfact.conv import from_torch, spec_of, to_torch
from fxfact.errors import ArgumentError, check_int
from fxfact.finetune.least_squares import LeastSquaresStats, solve_last_stage
from fxfact.finetune.patches import PART, at_positions, iter_patches
from fxfact.finetune.resumable_run import ResumableRun
from fxfact.finetune.teacher_student import FinetuneResult, TeacherStudent
from fxfact.utils import Progress, copy_with_shared, with_progress

_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class RefitResult(FinetuneResult):
    """What ``repair`` did, and the ``paths`` of the chains that were changed."""

    paths: tuple[str, ...]

    def _done(self) -> str:
        return f"{len(self.paths)} chains repaired"


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
    seed: int = 0,
    progress: Progress = False,
) -> tuple[_Network, RefitResult]:
    """A copy of a factorized network that is nearer to its original, and what was done. Neither is changed.

    ``last_stages``: the last stage of every chain is solved for, by least squares; ``means``: biases, or the running means of
    batch norms that follow convolutions without, take up what is left of a difference in the mean. Both go as far as
    either half of the samples gains by what the other says. No labels, no gradients: one run of the original over the
    batches and one of the factorized network, in which all of them go from chain to chain; where it is no graph, or
    what they hold between two chains has no room, for every chain one up to it. Every fourth batch is held out, to
    measure on; a network that came out farther from the original there, by more than may be chance, is given back as it
    was. Convolutions that are no modules, and those that share their weights, stay as they are. Memory: the outputs of
    all convolutions at 32 positions of every sample, and 1 GiB for those runs. ``seed`` draws the positions; batches,
    ``example_inputs``, ``likelihood`` and ``progress`` are as for ``fxfact.plan``. Of several processes each works
    alone, on its own batches: let one do it, and send the others what it made.
    Raises ArgumentError, ArgumentTypeError, CalibrationError, PlanError.
    """
    if not last_stages and not means:
        raise ArgumentError("refit has nothing to do: pass last_stages=True or means=True")
    seed = check_int("seed", seed, 0, MAX_SEED)
    started = time.perf_counter()
    pair = TeacherStudent(factorized, original, batches, example_inputs=example_inputs, likelihood=likelihood)
    before = pair.divergences()
    paths = _repaired(pair, seed, progress, last_stages=last_stages, means=means)
    after, result = pair.divergences(), cast(_Network, pair.finished())
    ends = [mean_and_error(values)[0] for values in (before, after)]
    if significantly_negative(before - after) or not math.isfinite(ends[1]):
        result, ends, paths = cast(_Network, copy_with_shared(factorized, set())), ends[:1] * 2, ()
    seconds = time.perf_counter() - started
    return result, RefitResult(before=ends[0], after=ends[1], paths=paths, seconds=seconds)


def _repaired(
    pair: TeacherStudent, seed: int, progress: Progress, *, last_stages: bool, means: bool
) -> tuple[str, ...]:
    """The paths of the chains that were changed."""
    sites, paths, walk = _sites(pair, seed), list[str](), ResumableRun(pair.factorized, pair.batches)
    for site in with_progress(sites, len(sites), "repairing", progress):
        found = _observed(pair, walk, site, seed)
        if found and _mend(pair, site, found, last_stages=last_stages, means=means):
            paths.append(site.path)
    return tuple(paths)


@dataclass
class _Site:
    """A rewritten convolution of the original. ``wanted`` is its output at the positions looked at, of every batch call
    by call, each (samples, positions, out); ``norm`` the path of a batch norm that takes its output and no other.
    """

    path: str
    wanted: list[list[Tensor]] = field(default_factory=list)
    norm: str | None = None


def _sites(pair: TeacherStudent, seed: int) -> list[_Site]:
    """In the order in which a run of the original reaches them."""
    ties = {path for d in pair.plan if d.tied_to for path in (d.path, d.tied_to)}
    convs = {m: _Site(p) for p, m in pair.rewritten.items() if p not in ties}
    norms: dict[nn.Module, str] = {m: name for name, m in pair.original.named_modules() if isinstance(m, _BatchNorm)}
    reached: dict[str, _Site] = {}
    latest: list[tuple[_Site, weakref.ref[Tensor], int]] = []
    taken: dict[str, set[str | None]] = {}  # by every norm, from which sites

    def behind(module: nn.Module, args: Any, output: Tensor) -> None:
        site = reached.setdefault(convs[module].path, convs[module])
        latest.append((site, weakref.ref(output), _version(output)))
        calls = site.wanted[-1]
        own_seed = _seed(seed, len(site.wanted) - 1, len(calls))
        calls.append(at_positions(output, spec_of(module).order, own_seed))

    def before(module: nn.Module, args: Any) -> None:
        own = [site.path for site, output, version in latest if args and _is(args[0], output(), version)]
        taken.setdefault(norms[module], set()).update(own or [None])

    handles = [module.register_forward_hook(behind) for module in convs]
    handles += [module.register_forward_pre_hook(before) for module in norms]
    for batch in pair.batches:
        for site in convs.values():
            site.wanted.append([])
        run_batch(pair.original, batch)
        latest.clear()
    for handle in handles:
        handle.remove()
    for norm, paths in taken.items():
        if len(paths) == 1 and (path := paths.pop()):
            reached[path].norm = norm
    return list(reached.values())


def _is(tensor: Any, output: Tensor | None, version: int) -> bool:
    """Whether a tensor is that output, not written to since."""
    return tensor is output and tensor is not None and _version(tensor) == version


def _version(tensor: Tensor) -> int:
    """How often it was written to, which a tensor of inference mode does not tell."""
    return -1 if tensor.is_inference() else tensor._version


def _seed(seed: int, batch: int, call: int) -> int:
    """Of the positions looked at in a call."""
    return (seed << 40) + (batch << 20) + call


def _observed(pair: TeacherStudent, walk: ResumableRun, site: _Site, seed: int) -> list[LeastSquaresStats] | None:
    """The moments of one site in the factorized network as it is by now, of two halves of the samples, or of all where
    they are few; none where it is given none, None where that calls it less often.
    """
    stage = pair.last_stage(site.path)
    groups, parts = spec_of(stage).groups, list[LeastSquaresStats]()
    number = call = 0

    def on_input(maps: Tensor) -> bool:
        nonlocal call
        wanted = torch.split(site.wanted[number][call], PART)
        for rows in zip(iter_patches(stage, maps, _seed(seed, number, call)), wanted, strict=True):
            x, y = (part.reshape(-1, groups, part.shape[-1] // groups).movedim(1, 0) for part in rows)
            if x.shape[1]:
                parts.append(LeastSquaresStats.of(x, y))
            if len(parts) > 2:
                parts[:] = [parts[1], parts[0] + parts[2]]
        call += 1
        return call == len(site.wanted[number])

    for number, wanted in enumerate(site.wanted):
        call = 0
        if wanted and not walk.run_until(number, stage, on_input):
            return None
    return parts


def _mend(
    pair: TeacherStudent, site: _Site, halves: list[LeastSquaresStats], *, last_stages: bool, means: bool
) -> bool:
    """Give the last stage of a site a new weight, and its mean to what stands for a bias; whether anything is new."""
    stage: Any = pair.last_stage(site.path)
    norm: Any = pair.factorized.get_submodule(site.norm) if site.norm else None
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
