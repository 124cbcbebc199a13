"""A model becomes a graph that meets the graph contract, without the model noticing."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from fxfact.conv_modules import has_hooks, is_conv
from fxfact.errors import ArgumentTypeError, CaptureError
from fxfact.graph.base import Captured, shape_of
from fxfact.graph.contract import check_contract
from fxfact.graph.match import match
from fxfact.graph.shapes import record_shapes
from fxfact.skip import Skip

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


class _Tracer(fx.Tracer):
    """Records stack traces; modules whose weight a parametrization computes stay whole, and so recognisable."""

    record_stack_traces = True

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return hasattr(module, "parametrizations") or super().is_leaf_module(module, qualified_name)


def capture(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Captured:
    """Trace ``model`` symbolically; a GraphModule is taken as it is.

    ``example_inputs`` (a tuple is the arguments, a mapping the keyword arguments, a tensor one argument) give the
    graph its shapes. Nothing is computed on them, and the model is not touched: its structure is copied and its
    tensors shared. Raises ArgumentTypeError, CaptureError.
    """
    check_model(model)
    own = copy_sharing(model, set(map(id, model.parameters())))
    traced = own if isinstance(own, fx.GraphModule) else _trace(own, type(model).__name__)
    for name, module in traced.named_modules():
        with contextlib.suppress(AttributeError):
            module.training = own.get_submodule(name).training
    total = None
    if example_inputs is not None:
        total = record_shapes(traced, bind_inputs(traced, model, example_inputs))
    samples = _samples(traced)
    check_contract(traced, f"behind the capture of {type(model).__name__}")
    return Captured(traced, None if total is None else total // samples, samples, _unreached(own, traced))


def check_model(model: object) -> None:
    """Raise ArgumentTypeError unless it is a module, CaptureError where it is one without parameters yet."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}. Pass the network itself."
        )
    if isinstance(model, fx.GraphModule) and has_hooks(model):
        raise CaptureError("the GraphModule has hooks, which a copy of it would lose. Remove them before.")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a ScriptModule has no graph that torch.fx can read. Pass the nn.Module it was made from.")
    for name, tensor in model.named_parameters():
        if is_lazy(tensor):
            raise CaptureError(f"{name}: the parameter is lazy and has no shape. Run the model once on an input first.")


def copy_sharing(module: nn.Module, shared: set[int]) -> nn.Module:
    """A deep copy that keeps, and does not copy, the tensors whose ``id`` is in ``shared``. Raises CaptureError.

    A tensor that is no leaf of autograd, such as the weight that a pruned module computed last, is copied detached.
    """
    tensors = {id(tensor): tensor for tensor in _tensors(module)}
    memo = {key: tensor for key, tensor in tensors.items() if key in shared}
    memo |= {key: tensor.detach().clone() for key, tensor in tensors.items() if not tensor.is_leaf}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(module).__name__} cannot be copied: {error}. Make it support copy.deepcopy."
        ) from error


def arguments_of(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tuple is the former, a mapping the latter, a tensor one argument."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def bind_inputs(graph_module: fx.GraphModule, model: nn.Module, example_inputs: ExampleInputs) -> list[Any]:
    """The values for the graph's placeholders, in their order. Raises CaptureError where the inputs do not fit."""
    args, kwargs = arguments_of(example_inputs)
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"example_inputs do not fit {type(model).__name__}.forward: {error}. A tuple is the arguments, a dict the "
            "keyword arguments, a tensor one argument."
        ) from error
    bound.apply_defaults()
    values: list[Any] = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            value = bound.arguments[str(node.target).lstrip("*")]
            values += value if str(node.target).startswith("*") else [value]
    return values


def _trace(model: nn.Module, name: str) -> fx.GraphModule:
    tracer = _Tracer()
    try:
        before = _buffers(model)
        graph = tracer.trace(model)
        _check_hooks(tracer, model)
        for changed, now in _buffers(model).items():
            if before.get(changed) != now:
                raise CaptureError(f"{changed}: forward changes this buffer, which a traced graph would no longer do.")
        for node in graph.nodes:
            if isinstance(node.type, str):  # a postponed annotation, which torch.fx cannot pickle
                node.type = None
        return fx.GraphModule(tracer.root, graph, name)
    except CaptureError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"{name}: torch.fx cannot trace its forward: {reason}. Remove the control flow that depends on values or "
            "shapes, or factorize the submodules that trace."
        ) from error


def _check_hooks(tracer: fx.Tracer, model: nn.Module) -> None:
    """Raise CaptureError for a hook on a module that was traced through: the graph would not run it."""
    leaves = {name for name, module in model.named_modules() if name and tracer.is_leaf_module(module, name)}
    for name, module in model.named_modules():
        inside_a_leaf = any(name == leaf or name.startswith(f"{leaf}.") for leaf in leaves)
        if not inside_a_leaf and has_hooks(module):
            raise CaptureError(
                f"{name or type(model).__name__}: it has hooks, which torch.fx loses where it traces through a module. "
                "Remove them before, or factorize the submodules without hooks."
            )


def _buffers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """What tells a buffer that was replaced or written to: its identity and its version."""
    return {name: (id(buffer), buffer._version) for name, buffer in model.named_buffers()}


def _samples(graph_module: fx.GraphModule) -> int:
    """How many samples the inputs had: the first size recorded, unless a convolution sees no batch, or none is."""
    calls = [(site.layer.spec.order, node) for site in match(graph_module).sites for node in site.nodes]
    batched = all(len(shape_of(node) or ()) == order + 2 for order, node in calls)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    shapes = [shape for node in placeholders for shape in _shapes(node.meta.get("val", node.meta.get("tensor_meta")))]
    sizes = [int(shape[0]) for shape in shapes if shape]
    return max(1, sizes[0]) if batched and sizes else 1


def _shapes(recorded: Any) -> list[tuple[int, ...]]:
    """Of every tensor in what a node's meta records, containers included."""
    if hasattr(recorded, "shape"):
        return [tuple(recorded.shape)]
    values = list(recorded.values()) if isinstance(recorded, Mapping) else recorded
    return [shape for value in values for shape in _shapes(value)] if isinstance(values, list | tuple) else []


def _unreached(model: nn.Module, traced: fx.GraphModule) -> tuple[Skip, ...]:
    reached = set(map(id, traced.modules())) | set(map(id, traced.parameters()))
    return tuple(
        Skip("forward does not call it", name)
        for name, module in model.named_modules()
        if is_conv(module) and id(module) not in reached and not reached & set(map(id, module.parameters()))
    )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and tensors that are plain attributes."""
    for child in module.modules():
        yield from (tensor for tensor in (*child._parameters.values(), *child._buffers.values()) if tensor is not None)
        yield from (value for value in vars(child).values() if isinstance(value, Tensor))
