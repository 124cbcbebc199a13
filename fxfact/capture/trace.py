"""The first rung: torch.fx traces the whole model into a graph, and what tracing would lose is looked for."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from fxfact.capture.base import Captured, ExampleInputs, check_arguments, drawn_from_seed, reason_of, samples_of
from fxfact.capture.guard import ParameterGuard
from fxfact.conv_modules import has_hooks, is_conv
from fxfact.copying import private_copy
from fxfact.errors import CaptureError
from fxfact.graph import check_contract, fold_computed_weights, match, record_shapes
from fxfact.skip import Skip


def trace(
    own: nn.Module,
    example_inputs: ExampleInputs | None,
    *,
    fold_weights: bool = False,
    leaves: Sequence[str] = (),
) -> Captured:
    """Capture a private copy of a model as a graph. A GraphModule, whose graph says what it does, is taken as it is.

    ``example_inputs`` give the graph its shapes; nothing is computed on them. ``leaves`` are globs on the paths of
    modules that are not looked into. Raises CaptureError where torch.fx cannot
    trace the model, or where its graph would not do what the model does: hooks, buffers that forward changes,
    gradients that it turns off, and Python that depends on the training mode are lost in tracing.
    """
    name = type(own).__name__
    if isinstance(own, fx.GraphModule):
        traced = own
    else:
        traced = _traced(own, name, leaves)
        _check_modes(own, traced, leaves)
    known = dict(own.named_modules())
    for path, module in traced.named_modules():
        module.training = known[path].training if path in known else own.training
    folded = fold_computed_weights(traced) if fold_weights else ()
    traced.recompile()
    total = None
    if example_inputs is not None:
        total = _record_shapes(traced, _placeholder_values(traced, own, example_inputs))
    check_contract(traced, f"behind the capture of {name}")
    found = match(traced)
    samples = samples_of(_recorded_inputs(traced) if example_inputs is None else example_inputs, found.sites)
    return Captured(
        rung="trace",
        network=traced,
        found=(*found.found, *_unreached(own, traced, folded)),
        macs=None if total is None else total // samples,
        samples=samples,
    )


class _Value(fx.Proxy):
    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("tracer", "node") and not name.startswith("_"):
            raise CaptureError(f"forward sets the attribute {name!r} of a tensor, which a traced graph would not do")
        object.__setattr__(self, name, value)


class _Tracer(fx.Tracer):
    """Records stack traces; modules whose weight a parametrization computes stay whole, and so recognisable."""

    record_stack_traces = True

    def __init__(self, leaves: Sequence[str] = ()) -> None:  # torch.fx makes one of its own to unpickle a graph
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        asked = any(fnmatchcase(qualified_name, pattern) for pattern in self._leaves)
        return asked or hasattr(module, "parametrizations") or super().is_leaf_module(module, qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


class _GradientsStayOn(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "_set_grad_enabled" and not args[0]:
            raise CaptureError("forward turns gradients off, which a traced graph would not do")
        return func(*args, **(kwargs or {}))


def _traced(own: nn.Module, name: str, leaves: Sequence[str]) -> fx.GraphModule:
    tracer = _Tracer(leaves)
    buffers = _buffers(own)
    with torch.enable_grad(), ParameterGuard(own) as guard:
        graph = _graph(tracer, own)
    guard.check()
    _check_hooks(tracer, own)
    for changed, now in _buffers(own).items():
        if buffers.get(changed) != now:
            raise CaptureError(f"{changed}: forward changes this buffer, which a traced graph would no longer do")
    for node in graph.nodes:
        if isinstance(node.type, str):  # a postponed annotation, which torch.fx cannot pickle
            node.type = None
    return fx.GraphModule(own, graph, name)


def _graph(tracer: fx.Tracer, own: nn.Module) -> fx.Graph:
    try:
        with _GradientsStayOn():
            return tracer.trace(own)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"torch.fx cannot trace forward: {reason_of(error)}") from error


def _check_modes(own: nn.Module, traced: fx.GraphModule, leaves: Sequence[str]) -> None:
    """Raise CaptureError where forward does different things in training and in evaluation, leaf modules apart."""
    for training in (True, False):
        if all(module.training == training for module in own.modules()):
            continue
        other = private_copy(own)
        for module in other.modules():
            module.training = training
        try:
            code = _traced(other, "", leaves).code
        except CaptureError as error:
            raise CaptureError(f"traced with training={training} it fails: {error}") from error
        if code != traced.code:
            raise CaptureError("forward depends on self.training, which a traced graph would freeze")


def _check_hooks(tracer: fx.Tracer, model: nn.Module) -> None:
    """Raise CaptureError for a hook on a module that was traced through: the graph would not run it."""
    leaves = {name for name, module in model.named_modules() if name and tracer.is_leaf_module(module, name)}
    for name, module in model.named_modules():
        inside_a_leaf = any(name == leaf or name.startswith(f"{leaf}.") for leaf in leaves)
        if not inside_a_leaf and has_hooks(module):
            raise CaptureError(f"{name or type(model).__name__} has hooks, which a traced graph would not run")


def _buffers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """What tells a buffer that was replaced or written to: its identity and its version."""
    return {name: (id(buffer), buffer._version) for name, buffer in model.named_buffers()}


def _placeholder_values(graph_module: fx.GraphModule, model: nn.Module, example_inputs: ExampleInputs) -> list[Any]:
    """The values for the graph's placeholders, in their order. Raises CaptureError where the inputs do not fit."""
    bound = check_arguments(model, example_inputs)
    values: list[Any] = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            value = bound.arguments[str(node.target).lstrip("*")]
            values += value if str(node.target).startswith("*") else [value]
    return values


def _record_shapes(traced: fx.GraphModule, values: list[Any]) -> int:
    """Without computing anything, unless a leaf decides by values."""
    try:
        return record_shapes(traced, values)
    except CaptureError:
        with ParameterGuard(traced), drawn_from_seed():
            return record_shapes(traced, values, fake=False)


def _recorded_inputs(graph_module: fx.GraphModule) -> list[Any]:
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    return [node.meta.get("val", node.meta.get("tensor_meta")) for node in placeholders]


def _unreached(model: nn.Module, traced: fx.GraphModule, folded: Sequence[str]) -> tuple[Skip, ...]:
    owners = {name.rpartition(".")[0] for name in folded}  # their own weights are gone, what was made of them is not
    reached = set(map(id, traced.modules())) | set(map(id, traced.parameters()))
    return tuple(
        Skip("forward does not call it", name)
        for name, module in model.named_modules()
        if is_conv(module)
        and name not in owners
        and id(module) not in reached
        and not reached & set(map(id, module.parameters()))
    )
