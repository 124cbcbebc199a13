"""Networks that are only going to be run: their fastest form, by measurement, and never a slower one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fxfact.capture import Captured, ExampleInputs, capture, copied_arguments
from fxfact.copying import copy_sharing, evaluated, private_copy
from fxfact.errors import ArgumentError, BudgetError
from fxfact.passes import applied, in_form, record_all
from fxfact.planning import Plan
from fxfact.timing import fastest

_FORMS = ((), ("fold_batch_norms",), ("channels_last",), ("fold_batch_norms", "channels_last"))
_FOR_ALL = ("fold_batch_norms", "merge_pointwise")


@dataclass(frozen=True)
class Form:
    """Passes (``fxfact.passes.in_form``), and the milliseconds of a network after them."""

    passes: tuple[str, ...]
    ms: float


def best_form(captured: Captured, *, compiled: bool = False) -> Form:
    """The fastest form of a network on its example inputs. Raises BudgetError where there are none."""
    if captured.example_inputs is None:
        raise BudgetError("a budget of milliseconds needs example_inputs, on which to measure")
    can_be_folded = isinstance(captured.network, fx.GraphModule) and captured.program is None
    forms: list[tuple[str, ...]]
    if captured.program is not None:
        forms = [()]
    elif compiled:  # the compiler chooses the memory format itself
        forms = [("fold_batch_norms",) if can_be_folded else ()]
    else:
        forms = [form for form in _FORMS if can_be_folded or "fold_batch_norms" not in form]
    network = evaluated(private_copy(captured.network))
    times = _milliseconds([in_form(network, form) for form in forms], captured.example_inputs, compiled=compiled)
    return min((Form(form, ms) for form, ms in zip(forms, times, strict=True)), key=lambda form: form.ms)


def for_inference(model: nn.Module, example_inputs: ExampleInputs) -> nn.Module:
    """A copy of the model, in evaluation mode, in the fastest form that computes the same: batch norms folded into
    convolutions, 1×1 convolutions with nothing between merged, convolutions in channels_last if that measures faster.

    Of a model that torch.fx cannot trace only the last. Raises ArgumentError, ArgumentTypeError, CaptureError.
    """
    if isinstance(model, ExportedProgram):
        raise ArgumentError("an exported program is made for inference by what compiles it: pass the model itself")
    captured = capture(model, example_inputs)
    network = in_form(evaluated(captured.network), _FOR_ALL)
    forms = [network, in_form(network, ("channels_last",))]
    times = _milliseconds(forms, example_inputs, compiled=False)
    return copy_sharing(forms[times.index(min(times))], set())


def never_slower(
    captured: Captured, plan: Plan, result: nn.Module, carry_out: Callable[[Plan], Any], *, compiled: bool
) -> nn.Module:
    """What was made by a plan with a form, if it measures no slower than the dense network in that form; else that, as
    ``carry_out`` makes it of a plan without rewrites, each with the reason.
    """
    before, after = against_dense(captured, plan, result, compiled=compiled)
    if after <= before:
        *earlier, last = applied(result)
        record_all(result, (*earlier, replace(last, plan=replace(plan, timed=(before, after)))))
        return result
    for decision in plan.rewrites:
        plan = plan.edited(decision.path, skip=f"the whole network measured slower: {before:.3g} → {after:.3g} ms")
    kept: nn.Module = carry_out(replace(plan, timed=(before, before)))
    return kept


def against_dense(
    captured: Captured, plan: Plan, result: nn.Module, *, compiled: bool, repeats: int = 15
) -> tuple[float, float]:
    """Milliseconds of the dense network in the form of a plan, and of what was made by it, taking turns."""
    assert captured.example_inputs is not None
    dense = in_form(evaluated(private_copy(captured.network)), plan.form)
    networks = [dense, evaluated(private_copy(result))]
    before, after = _milliseconds(networks, captured.example_inputs, compiled=compiled, repeats=repeats)
    return before, after


def _milliseconds(
    networks: Sequence[nn.Module], example_inputs: ExampleInputs, *, compiled: bool, repeats: int = 15
) -> list[float]:
    """Of each one call on the example inputs, taking turns, the fastest of ``repeats``."""
    args, kwargs = copied_arguments(example_inputs)
    calls: list[Callable[..., Any]] = [
        _compiled(network, args, kwargs) if compiled else network for network in networks
    ]
    return fastest([partial(call, *args, **kwargs) for call in calls], repeats=repeats)


@torch.no_grad()
def _compiled(network: nn.Module, args: Any, kwargs: Any) -> Callable[..., Any]:
    import torch._inductor.config as inductor  # noqa: PLC0415 (takes seconds, so only who compiles imports it)

    with inductor.patch(freezing=True):
        call: Callable[..., Any] = torch.compile(network, dynamic=False)
        call(*args, **kwargs)
    return call
