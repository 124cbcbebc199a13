"""Networks that will only be run: the exact passes that make them fastest, by measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from fxfact.calibration import cut_batch
from fxfact.capture import Captured, ExampleInputs, capture, copy_arguments, run_model, seeded_rng
from fxfact.conv import supports_onednn
from fxfact.errors import ArgumentError, ArgumentTypeError, BudgetError, SpeedWarning, TimingError
from fxfact.passes import (
    ChannelsLast,
    FoldBatchNorms,
    MergePointwise,
    OneDNN,
    can_be_linear,
    can_be_onednn,
    last_plan,
    linear_passes,
    pass_history,
    run_passes,
    update_plan,
)
from fxfact.planning import Latency, Plan
from fxfact.utils import (
    Timer,
    alias_copy,
    as_timing_errors,
    copy_with_shared,
    difference,
    summarize_turns,
    to_eval,
    warn_caller,
)

_MAX_RATIO = 1.1  # of the measured time to the budget, before a warning
_TURNS = 100  # of whole networks
_MAX_SECONDS = 12.0  # for these turns; there are fewer if they would take longer
_CHECK_TURNS, _CHECK_SECONDS = 5, 1.0  # of networks that were not made for speed
_CLEARLY_SLOWER = 1.05
_STRICTNESS = 100.0  # tolerances between variants of a network, because GPUs may round to TF32
_CALLS_BEFORE_GRAPH = 3  # torch.compile records CUDA graphs in the third call
_Call = Callable[[], Any]


@dataclass(frozen=True)
class FastestPasses:
    """The exact passes that make a dense network fastest.

    Attributes:
        passes: their names (see ``fxfact.passes.INFERENCE_PASSES``).
        ms: milliseconds of the network after them.
        linear_undecided: whether 1×1 convolutions of chains might be faster as matrix products. The dense network has
            none, so it does not tell.
    """

    passes: tuple[str, ...]
    ms: float
    linear_undecided: bool


def best_inference_passes(captured: Captured, *, compiled: bool, timer: Timer) -> FastestPasses:
    """Return the passes that make a network fastest on its example inputs. Raises BudgetError if there are none."""
    if captured.example_inputs is None:
        raise BudgetError("a budget of milliseconds needs example_inputs, on which to measure")
    can_fold = isinstance(captured.network, fx.GraphModule) and captured.program is None
    folds: list[tuple[str, ...]] = [_folds(captured)] if can_fold and _folds(captured) else []
    computations, linear = _computations(captured), linear_passes(site.spec for site in captured.sites)
    variants: list[tuple[str, ...]]
    if captured.program is not None:
        variants = [()]
    elif compiled:  # the compiler chooses the memory format itself
        variants = [(*fold, *passes) for fold in folds or [()] for passes in computations if passes in ((), linear)]
    else:
        variants = [(*fold, *passes) for passes in computations for fold in [(), *folds]]
    network = to_eval(alias_copy(captured.network))
    passes, ms = _fastest(network, variants, captured.example_inputs, compiled=compiled, timer=timer)
    if captured.program is not None or linear in computations:
        return FastestPasses(passes, ms, linear_undecided=False)
    layout = linear[:-1]  # the memory format that matrix products of chains would need
    if compiled:
        is_possible = layout in _equivalent_variants(network, [passes, layout], captured.example_inputs)
    else:
        is_possible = {*layout} <= {*passes}
    return FastestPasses(passes, ms, linear_undecided=is_possible)


def _folds(captured: Captured) -> tuple[str, ...]:
    """Return the pass that folds batch norms, unless a 1-D map has no batch axis.

    ``nn.BatchNorm1d`` takes the channels of such a map for samples. A plan that is applied without example inputs
    could not tell, and would fold it.
    """
    sites = [site for site in captured.sites if site.spec.order == 1]
    unbatched = any(len(shape) == 2 for site in sites for shape in site.input_shapes or ())
    return () if unbatched else (FoldBatchNorms.name,)


def _computations(captured: Captured) -> list[tuple[str, ...]]:
    """Return the ways to compute convolutions that might be faster for this network."""
    specs = [site.spec for site in captured.sites]
    found: list[tuple[str, ...]] = [(), *([(ChannelsLast.name,)] if any(spec.order > 1 for spec in specs) else [])]
    found += [linear_passes(specs)] if any(map(can_be_linear, specs)) else []
    has_onednn = any(can_be_onednn(site.spec) and supports_onednn(site.weight) for site in captured.sites)
    return [*found, *((*passes, OneDNN.name) for passes in found if has_onednn)]


@torch.inference_mode(False)  # parameters made in inference mode could never be trained
def for_inference(model: nn.Module, example_inputs: ExampleInputs, *, timer: Timer | None = None) -> nn.Module:
    """Return the fastest network that computes the same, for networks that will only be run.

    Batch norms are folded into convolutions, and consecutive 1×1 convolutions are merged. If that measures faster,
    convolutions use channels_last, 1×1 ones become matrix products, and 3-D ones use oneDNN. If torch.fx cannot trace
    the model, only what is measured is done. ``fxfact.verify`` and ``fxfact.report`` need the network from before,
    because stages of neighbouring chains may be merged.

    Args:
        model: a network. It is not changed.
        example_inputs: a tuple is the arguments, a mapping the keyword arguments, a tensor one argument.
        timer: measures the calls. Default: this machine's clock.

    Returns:
        A copy in evaluation mode.

    Raises:
        ArgumentError: for an exported program, or without example inputs.
        ArgumentTypeError: for a model or a timer of another type.
        CaptureError: if the model cannot be captured.
        TimingError: if it does not run.
    """
    if isinstance(model, ExportedProgram):
        raise ArgumentError("an exported program is optimized for inference by its compiler: pass the model itself")
    if example_inputs is None:
        raise ArgumentError("the fastest variant is found by measuring: for_inference needs example_inputs")
    if timer is not None and not isinstance(timer, Timer):
        raise ArgumentTypeError(f"timer must be a fxfact.utils.Timer, got {timer!r}")
    captured = capture(model, example_inputs)
    always = (*_folds(captured), MergePointwise.name)
    folded = run_passes(to_eval(captured.network), always)
    variants = _computations(captured)
    best, _ = _fastest(folded, variants, example_inputs, compiled=False, timer=timer or Timer())
    network = copy_with_shared(run_passes(folded, best), set())
    if history := pass_history(network):
        passes = tuple(dict.fromkeys((*history[-1].plan.inference_passes, *always, *best)))
        update_plan(network, inference_passes=passes, capture=captured.frontend)  # so that the plan does the same again
    return network


class DenseBaseline:
    """The dense network after the passes of a plan, to time other networks against."""

    def __init__(self, captured: Captured, passes: Sequence[str], *, compiled: bool, timer: Timer) -> None:
        assert captured.example_inputs is not None
        self._example_inputs, self._compiled, self._timer = captured.example_inputs, compiled, timer
        self._dense = self._call_of(run_passes(to_eval(alias_copy(captured.network)), passes))

    def milliseconds(self) -> float:
        """Measure the dense network."""
        return _side_by_side([self._dense], self._timer)[0]

    def compare(self, network: nn.Module) -> tuple[float, float]:
        """Return the milliseconds of the dense network and of another one, measured in turns."""
        dense, other = _side_by_side([self._dense, self._call_of(to_eval(alias_copy(network)))], self._timer)
        return dense, other

    def _call_of(self, network: nn.Module) -> _Call:
        return _as_call(network, self._example_inputs, compiled=self._compiled)


def fall_back_if_slower(
    captured: Captured, plan: Plan, result: nn.Module, apply_plan: Callable[[Plan], Any], budget: Latency
) -> nn.Module:
    """Return the result of a plan for a budget of milliseconds, or the dense network if the result is slower.

    Warns if the result is not as fast as the budget asks for. ``apply_plan`` makes the dense network from a plan
    without rewrites, which gives the reason.
    """
    baseline = DenseBaseline(captured, plan.inference_passes, compiled=budget.compiled, timer=budget.timer)
    before, after = baseline.compare(result)
    if after <= before:
        network_ms = plan.network.ms
        if network_ms is not None and after / before > _MAX_RATIO * budget.allowed(plan.network) / network_ms:
            warn_caller(
                f"the result measures {after:.3g} ms and the dense network {before:.3g} ms, in turns, which is not "
                "what was asked for and predicted. Try again when the machine is idle."
            )
        update_plan(result, measured_ms=(before, after))
        return result
    for decision in plan.rewrites:
        plan = plan.edited(decision.path, skip=f"the whole network measured slower: {before:.3g} → {after:.3g} ms")
    dense: nn.Module = apply_plan(replace(plan, measured_ms=(before, before)))
    return dense


@seeded_rng()
def warn_if_slower(
    captured: Captured, result: nn.Module, batch: ExampleInputs | None = None, timer: Timer | None = None
) -> None:
    """Warn if a factorized network is clearly slower than the original, and note it in its plan.

    Both run in evaluation mode, on the example inputs and on as much of ``batch`` as takes about a second. A network
    that cannot be timed is left alone.
    """
    if captured.example_inputs is None or not last_plan(result).rewrites:
        return
    networks = [to_eval(alias_copy(network)) for network in (captured.network, result)]
    timer, compared = timer or Timer(), []
    with suppress(TimingError):
        compared.append(_compare_times(networks, captured.example_inputs, timer))
        samples = int(1000 * _CHECK_SECONDS / (2 * _CHECK_TURNS * compared[0].before))
        if batch is not None and samples > 1:
            compared.append(_compare_times(networks, cut_batch(batch, samples), timer))
    slower = [times for times in compared if times.is_slower]
    if slower:
        update_plan(result, measured_ms=(slower[-1].before, slower[-1].after))
        warn_caller(
            f"the factorized network is slower than the original, although it computes less: "
            f"{' and '.join(map(str, slower))}. Pass example_inputs of the batch size that you will use. If it is "
            "slower there too, pass budget=fxfact.Latency(0.5), which chooses ranks by the clock.",
            SpeedWarning,
        )


class _Times(NamedTuple):
    """Milliseconds of two networks on the same inputs, and whether the second is slower by more than chance."""

    inputs: ExampleInputs
    before: float
    after: float
    is_slower: bool

    def __str__(self) -> str:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor))
        return f"{self.before:.3g} → {self.after:.3g} ms for inputs of shape {shapes}"


def _compare_times(networks: Sequence[nn.Module], inputs: ExampleInputs, timer: Timer) -> _Times:
    calls = [_as_call(network, inputs, compiled=False) for network in networks]
    turns = timer.turns(calls, repeats=_CHECK_TURNS, number=1, within=_CHECK_SECONDS)
    before, after = summarize_turns(turns)
    return _Times(inputs, before, after, min(after, *turns[1]) > _CLEARLY_SLOWER * before)


def _fastest(
    network: nn.Module,
    variants: Sequence[tuple[str, ...]],
    example_inputs: ExampleInputs,
    *,
    compiled: bool,
    timer: Timer,
) -> tuple[tuple[str, ...], float]:
    """Return the passes that measure fastest, and the milliseconds."""
    networks = _equivalent_variants(network, variants, example_inputs)
    calls = [_as_call(variant, example_inputs, compiled=compiled) for variant in networks.values()]
    return min(zip(networks, _side_by_side(calls, timer), strict=True), key=lambda pair: pair[1])


def _equivalent_variants(
    network: nn.Module, variants: Sequence[tuple[str, ...]], example_inputs: ExampleInputs
) -> dict[tuple[str, ...], nn.Module]:
    """Return the network after the first passes, and after those others with which it computes the same.

    ``Tensor.view`` may refuse a feature map in channels_last, and random numbers come in another order there.
    """
    first, *others = variants
    found = {first: run_passes(alias_copy(network), first)}
    with as_timing_errors():
        expected = run_model(found[first], example_inputs) if others else None
    for passes in others:
        variant = run_passes(alias_copy(network), passes)
        # GraphModule.__call__ would print the errors that forward raises.
        forward = variant.forward if isinstance(variant, fx.GraphModule) else variant
        with suppress(Exception):
            if not difference(expected, run_model(forward, example_inputs), strictness=_STRICTNESS):
                found[passes] = variant
    return found


@seeded_rng()  # leaves the caller's random number generators as they are
def _side_by_side(calls: Sequence[_Call], timer: Timer) -> list[float]:
    return timer.side_by_side(calls, repeats=_TURNS, within=_MAX_SECONDS)


def _as_call(network: nn.Module, example_inputs: ExampleInputs, *, compiled: bool) -> _Call:
    """Return one call on a copy of the example inputs."""
    args, kwargs = copy_arguments(example_inputs)
    return partial(_compile(network, args, kwargs) if compiled else network, *args, **kwargs)


@seeded_rng()
@torch.no_grad()
def _compile(network: nn.Module, args: Any, kwargs: Any) -> Callable[..., Any]:
    import torch._inductor.config as inductor  # noqa: PLC0415 (takes seconds, so it is imported only to compile)

    on_cpu = all(leaf.device.type == "cpu" for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    settings = {"freezing": True, "cpp_wrapper": on_cpu, "triton.cudagraphs": not on_cpu}
    with inductor.patch(settings):  # freezing has no effect among torch.compile's options
        call: Callable[..., Any] = torch.compile(network, dynamic=False)
        for _ in range(1 if on_cpu else _CALLS_BEFORE_GRAPH):
            call(*args, **kwargs)
    return call
