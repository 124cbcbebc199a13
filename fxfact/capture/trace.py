"""The front end 'trace': torch.fx traces the whole model into a graph. Checks that the graph loses nothing."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

from torch import fx, nn

from fxfact.capture.attribute_reads import lost_members
from fxfact.capture.base import Captured, ExampleInputs, check_arguments, reason_of, samples_of, seeded_rng
from fxfact.capture.guards import ParameterChangedError, ParameterGuard, PrivateCopy
from fxfact.capture.trace_checks import check_parameters, is_constant
from fxfact.capture.traced_module import TracedGraphModule, keep_attributes
from fxfact.capture.tracer import Observed, Trace, TraceSettings, trace
from fxfact.conv import Skip, is_conv
from fxfact.errors import CaptureError
from fxfact.graph import checked_match, fold_computed_weights, get_tensor, record_shapes
from fxfact.utils import difference, get_metadata, set_metadata


def capture_graph(
    copies: PrivateCopy,
    example_inputs: ExampleInputs | None,
    *,
    fold_weights: bool = False,
    leaf_modules: Sequence[str] = (),
) -> Captured:
    """Capture a model as a graph. The graph of a GraphModule is taken as it is.

    Args:
        copies: private copies of the model.
        example_inputs: inputs that give the graph its shapes. They are not computed with, unless the control flow of a
            leaf module depends on values.
        fold_weights: whether to fold weights that the graph computes from parameters.
        leaf_modules: globs on the paths of modules that are not traced into.

    Raises:
        ParameterChangedError: if forward changes a parameter.
        CaptureError: if torch.fx cannot trace the model, or if the graph would lose something: hooks, attributes that
            forward sets, a context or setting of PyTorch that it changes (gradients, autocast, hooks for saved
            tensors, modes, flags of backends), or a dependence on the training mode or on optional arguments.
    """
    own = copies.get()
    traced: fx.GraphModule
    lost: tuple[str, ...]
    name, modes = type(own).__name__, {module.training for module in own.modules()}
    if isinstance(own, fx.GraphModule):
        traced, lost = own, ()
        check_parameters(own.graph, own)
    else:
        observed = Observed()
        first = trace(own, leaf_modules, observed)
        _check_settings(copies, first, modes, leaf_modules, observed)
        _check_optional_arguments(copies, first, leaf_modules, observed)
        traced, read = _graph_module(first, name), observed.attributes.values
        keep_attributes(traced, own, read)
        lost = lost_members(own, traced, read)
        set_metadata(traced, get_metadata(own))
    copies.discard()  # the graph module keeps its leaf modules
    known = dict(own.named_modules())
    for path, module in traced.named_modules():
        module.training = known[path].training if path in known else own.training
    folded = fold_computed_weights(traced) if fold_weights else ()
    traced.recompile()
    total = None
    if example_inputs is not None:
        total = _record_shapes(traced, _placeholder_values(traced, own, example_inputs))
    found = checked_match(traced, f"after the capture of {name}")
    samples = samples_of(_recorded_inputs(traced) if example_inputs is None else example_inputs, found.sites)
    return Captured(
        frontend="trace",
        model=name,
        network=traced,
        found=(*found.found, *_unreached(own, traced, folded)),
        macs=None if total is None else total // samples,
        samples=samples,
        lost_members=lost,
    )


def _graph_module(traced: Trace, name: str) -> fx.GraphModule:
    try:
        return TracedGraphModule(traced.root, traced.graph, name)
    except Exception as error:
        raise CaptureError(f"torch.fx cannot make a module of the graph: {reason_of(error)}") from error


def _check_settings(
    copies: PrivateCopy, first: Trace, modes: Collection[bool], leaf_modules: Sequence[str], observed: Observed
) -> None:
    """Trace again with other settings, and raise CaptureError if the graph differs.

    If forward does not ask whether gradients or autocast are on, only the training mode can make a difference. Then one
    trace in the other mode is enough. It changes the other settings too, in case that ``calls`` has missed a question.
    Otherwise every combination of training mode and gradients is traced, and autocast.
    """

    def mismatch(settings: TraceSettings) -> str:
        try:
            second = trace(copies.get(), leaf_modules, observed, settings)
        except ParameterChangedError as error:
            if settings.training is None or settings.training in modes:
                raise
            return str(error).rstrip(".")
        except CaptureError as error:
            return f"traced with {settings}, it fails: {error}"
        if second.code != first.code:
            return f"forward depends on {_switches(settings)}, which tracing would freeze"
        if not (settings.autocast and observed.calls.reads) and not _same_constants(first, second):
            return "forward creates a tensor whose values differ between calls. Tracing would freeze it"
        return ""

    changed = [TraceSettings(not mode, gradients=False, autocast=True, seed=2) for mode in modes]
    reason = "" if observed.calls.reads else next(filter(None, map(mismatch, changed)), "")
    if observed.calls.reads:
        pairs = [(mode, gradients) for mode in (True, False) for gradients in (True, False)]
        others = [TraceSettings(*pair, seed=2) for pair in pairs if not (pair[1] and modes == {pair[0]})]
        reason = next(filter(None, map(mismatch, [*others, TraceSettings(autocast=True)])), "")
    if reason:
        raise CaptureError(reason)


def _switches(settings: TraceSettings) -> str:
    """Say which settings differ from those of the first trace."""
    modes = "" if settings.training is None else "self.training or torch.is_grad_enabled()"
    return " or ".join(filter(None, [modes, "torch.is_autocast_enabled()" if settings.autocast else ""]))


def _check_optional_arguments(
    copies: PrivateCopy, first: Trace, leaf_modules: Sequence[str], observed: Observed
) -> None:
    """Trace again without optional arguments, and raise CaptureError if the graph differs."""
    signature = inspect.signature(first.root.forward).parameters.values()
    optional = {p.name: p.default for p in signature if p.default is not inspect.Parameter.empty}
    if not optional:
        return
    second = trace(copies.get(), leaf_modules, observed, TraceSettings(), optional)
    if _operations(first.graph) != _operations(second.graph):
        raise CaptureError(f"forward depends on whether {', '.join(optional)} is given, which tracing would freeze")


def _same_constants(one: Trace, other: Trace) -> bool:
    names = [str(node.target) for node in one.graph.nodes if is_constant(node)]
    pairs = [(get_tensor(one.root, name), get_tensor(other.root, name)) for name in names]
    return all(a is not None and b is not None and difference(a, b, strictness=0.0) == "" for a, b in pairs)


def _operations(graph: fx.Graph) -> list[tuple[str, str]]:
    """Return the operations of a graph without arguments, and without the assertions on arguments with a value."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    names = [(node.op, getattr(node.target, "__name__", str(node.target))) for node in nodes]
    return [pair for pair in names if pair[1] not in ("_assert_is_none", "_assert", "eq")]


def _placeholder_values(graph_module: fx.GraphModule, model: nn.Module, example_inputs: ExampleInputs) -> list[Any]:
    """Return the values for the placeholders, in order. Raises CaptureError if the inputs do not fit."""
    bound = check_arguments(model, example_inputs)
    values: list[Any] = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            name = str(node.target).lstrip("*")
            if name not in bound.arguments:
                raise CaptureError(f"the graph takes its arguments apart: its input {name} is no argument of forward")
            value = bound.arguments[name]
            values += value if str(node.target).startswith("*") else [value]
    return values


def _record_shapes(traced: fx.GraphModule, values: list[Any]) -> int:
    """Record shapes without computing anything, unless the control flow of a leaf module depends on values."""
    try:
        return record_shapes(traced, values)
    except CaptureError:
        with ParameterGuard(traced), seeded_rng():
            return record_shapes(traced, values, fake=False)


def _recorded_inputs(graph_module: fx.GraphModule) -> list[Any]:
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    return [node.meta.get("val", node.meta.get("tensor_meta")) for node in placeholders]


def _unreached(model: nn.Module, traced: fx.GraphModule, folded: Sequence[str]) -> tuple[Skip, ...]:
    """Return a Skip for every convolution of the model that the graph does not use."""
    owners = {name.rpartition(".")[0] for name in folded}  # the graph uses the folded weight instead of theirs
    reached = set(map(id, traced.modules())) | set(map(id, traced.parameters()))
    return tuple(
        Skip("forward does not call it", name)
        for name, module in model.named_modules()
        if is_conv(module)
        and name not in owners
        and id(module) not in reached
        and not reached & set(map(id, module.parameters()))
    )
