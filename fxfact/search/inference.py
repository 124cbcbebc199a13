"""Networks that are only going to be run: their fastest form, by measurement, and never a slower one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from fxfact.capture import Captured, ExampleInputs, capture, copy_arguments, run_model, seeded_rng
from fxfact.conv import can_be_linear, can_be_onednn, linear_form, supports_onednn
from fxfact.errors import ArgumentError, BudgetError
from fxfact.passes import pass_history, run_passes, update_plan
from fxfact.planning import Latency, Plan
from fxfact.utils import alias_copy, as_timing_errors, copy_with_shared, difference, side_by_side, to_eval, warn_caller

_FOR_ALL = ("fold_batch_norms", "merge_pointwise")
_FAR = 1.1  # from the time asked for
_TURNS, _WITHIN = 100, 12.0  # of whole networks, fewer where they would take more seconds
_APART = 100.0  # tolerances between forms of a network, for GPUs may round to TF32
_UNTIL_RECORDED = 3  # calls, of which CUDA graphs are made
_Call = Callable[[], Any]


@dataclass(frozen=True)
class InferencePasses:
    """Passes (``fxfact.passes.in_form``), and the milliseconds of a network after them.

    ``undecided`` says that 1×1 convolutions of chains may be matrix products or not, for the network has none.
    """

    passes: tuple[str, ...]
    ms: float
    undecided: bool


def best_inference_passes(captured: Captured, *, compiled: bool) -> InferencePasses:
    """The fastest form of a network on its example inputs. Raises BudgetError where there are none."""
    if captured.example_inputs is None:
        raise BudgetError("a budget of milliseconds needs example_inputs, on which to measure")
    can_be_folded = isinstance(captured.network, fx.GraphModule) and captured.program is None
    folded: list[tuple[str, ...]] = [("fold_batch_norms",)] if can_be_folded else []
    formats, linear = _formats(captured), linear_form(site.spec for site in captured.sites)
    forms: list[tuple[str, ...]]
    if captured.program is not None:
        forms = [()]
    elif compiled:  # the compiler chooses the memory format itself
        forms = [(*fold, *form) for fold in folded or [()] for form in formats if form in ((), linear)]
    else:
        forms = [(*fold, *form) for form in formats for fold in [(), *folded]]
    network = to_eval(alias_copy(captured.network))
    passes, ms = _fastest(network, forms, captured.example_inputs, compiled=compiled)
    if captured.program is not None or linear in formats:
        return InferencePasses(passes, ms, undecided=False)
    layout = linear[:-1]  # in which the matrix products of chains would be
    if compiled:
        able = _able(network, [passes, layout], captured.example_inputs)
    return InferencePasses(passes, ms, undecided=layout in able if compiled else {*layout} <= {*passes})


def _formats(captured: Captured) -> list[tuple[str, ...]]:
    """Ways to compute convolutions that may be faster, of those that the network has."""
    specs = [site.spec for site in captured.sites]
    found: list[tuple[str, ...]] = [(), *([("channels_last",)] if any(spec.order > 1 for spec in specs) else [])]
    found += [linear_form(specs)] if any(map(can_be_linear, specs)) else []
    by_onednn = any(can_be_onednn(site.spec) and supports_onednn(site.weight) for site in captured.sites)
    return [*found, *((*form, "onednn") for form in found if by_onednn)]


@torch.inference_mode(False)  # whose parameters could never be trained
def for_inference(model: nn.Module, example_inputs: ExampleInputs) -> nn.Module:
    """A copy of the model, in evaluation mode, in the fastest form that computes the same: batch norms folded into
    convolutions, 1×1 convolutions with nothing between merged, and if that measures faster convolutions in
    channels_last, 1×1 ones as matrix products, 3-D ones by oneDNN.

    Of a model that torch.fx cannot trace only what is measured. Stages of neighbouring chains may be merged too:
    ``verify`` and ``report`` want the network from before. Raises ArgumentError, ArgumentTypeError, CaptureError.
    """
    if isinstance(model, ExportedProgram):
        raise ArgumentError("an exported program is made for inference by what compiles it: pass the model itself")
    if example_inputs is None:
        raise ArgumentError("the fastest form is found by measuring: for_inference needs example_inputs")
    captured = capture(model, example_inputs)
    formats = _formats(captured)
    folded = run_passes(to_eval(captured.network), _FOR_ALL)
    best, _ = _fastest(folded, formats, example_inputs, compiled=False)
    network = copy_with_shared(run_passes(folded, best), set())
    if history := pass_history(network):
        form = tuple(dict.fromkeys((*history[-1].plan.inference_passes, *_FOR_ALL, *best)))
        update_plan(network, inference_passes=form, capture=captured.frontend)  # so that the plan makes it again
    return network


class DenseBaseline:
    """The dense network in the form of a plan, made once, for others to be timed against."""

    def __init__(self, captured: Captured, form: Sequence[str], *, compiled: bool) -> None:
        assert captured.example_inputs is not None
        self._example_inputs, self._compiled = captured.example_inputs, compiled
        self._dense = self._call(run_passes(to_eval(alias_copy(captured.network)), form))

    def milliseconds(self) -> float:
        """Its own, measured now."""
        return _side_by_side([self._dense])[0]

    def times(self, network: nn.Module) -> tuple[float, float]:
        """Milliseconds of its own and of the network, taking turns."""
        before, after = _side_by_side([self._dense, self._call(to_eval(alias_copy(network)))])
        return before, after

    def _call(self, network: nn.Module) -> _Call:
        return _called(network, self._example_inputs, compiled=self._compiled)


def fall_back_if_slower(
    captured: Captured, plan: Plan, result: nn.Module, carry_out: Callable[[Plan], Any], budget: Latency
) -> nn.Module:
    """What was made by a plan for a budget, if it measures no slower than the dense network in its form, with a warning
    where it is not as fast as that asks for; else that network, as ``carry_out`` makes it of a plan without rewrites,
    each with the reason.
    """
    before, after = DenseBaseline(captured, plan.inference_passes, compiled=budget.compiled).times(result)
    if after <= before:
        if plan.network.ms is not None and after / before > _FAR * budget.allowed(plan.network) / plan.network.ms:
            warn_caller(
                f"what came out measures {after:.3g} ms and the dense network {before:.3g} ms, taking turns, which is "
                "not what was asked for and foreseen. Try again when the machine is idle.",
            )
        update_plan(result, measured_ms=(before, after))
        return result
    for decision in plan.rewrites:
        plan = plan.edited(decision.path, skip=f"the whole network measured slower: {before:.3g} → {after:.3g} ms")
    kept: nn.Module = carry_out(replace(plan, measured_ms=(before, before)))
    return kept


def _fastest(
    network: nn.Module, forms: Sequence[tuple[str, ...]], example_inputs: ExampleInputs, *, compiled: bool
) -> tuple[tuple[str, ...], float]:
    """Of the forms in which it is able the one that measures fastest, and its milliseconds."""
    able = _able(network, forms, example_inputs)
    times = _side_by_side([_called(made, example_inputs, compiled=compiled) for made in able.values()])
    return min(zip(able, times, strict=True), key=lambda pair: pair[1])


def _able(
    network: nn.Module, forms: Sequence[tuple[str, ...]], example_inputs: ExampleInputs
) -> dict[tuple[str, ...], nn.Module]:
    """Copies of the network in the first of these forms, and in those others in which it computes the same:
    ``Tensor.view`` may refuse a map in channels_last, and random numbers come in another order there.
    """
    first, *others = forms
    made = {first: run_passes(alias_copy(network), first)}
    with as_timing_errors():
        expected = run_model(made[first], example_inputs) if others else None
    for form in others:
        other = run_passes(alias_copy(network), form)
        forward = other.forward if isinstance(other, fx.GraphModule) else other  # a graph module prints what it raises
        with suppress(Exception):
            if not difference(expected, run_model(forward, example_inputs), strictness=_APART):
                made[form] = other
    return made


@seeded_rng()  # what a network draws is not of the caller's generators
def _side_by_side(calls: Sequence[_Call]) -> list[float]:
    return side_by_side(calls, repeats=_TURNS, within=_WITHIN)


def _called(network: nn.Module, example_inputs: ExampleInputs, *, compiled: bool) -> _Call:
    """One call on a copy of the example inputs."""
    args, kwargs = copy_arguments(example_inputs)
    return partial(_compiled(network, args, kwargs) if compiled else network, *args, **kwargs)


@seeded_rng()
@torch.no_grad()
def _compiled(network: nn.Module, args: Any, kwargs: Any) -> Callable[..., Any]:
    import torch._inductor.config as inductor  # noqa: PLC0415 (takes seconds, so only who compiles imports it)

    on_cpu = all(leaf.device.type == "cpu" for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    how = {"freezing": True, "cpp_wrapper": on_cpu, "triton.cudagraphs": not on_cpu}
    with inductor.patch(how):  # freezing does nothing among torch.compile's options
        call: Callable[..., Any] = torch.compile(network, dynamic=False)
        for _ in range(1 if on_cpu else _UNTIL_RECORDED):
            call(*args, **kwargs)
    return call
