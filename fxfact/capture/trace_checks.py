"""Finds what a traced graph would lose: attributes, hooks, and in-place writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._pytree import tree_leaves

from fxfact.capture.guards import ParameterChangedError, written_arguments
from fxfact.conv import has_hooks, is_conv
from fxfact.errors import CaptureError

_IN_PLACE = {"setitem", *(f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow"))}
_SIZES = {
    "size",
    "dim",
    "numel",
    "nelement",
    "ndimension",
    "stride",
    "storage_offset",
    "element_size",
    "item",
    "__len__",
}
_SIZE_ATTRIBUTES = {"shape", "ndim", "itemsize", "nbytes", "dtype", "device"}
_VIEWS = {
    "data",
    "T",
    "mT",
    "detach",
    "view",
    "view_as",
    "reshape",
    "getitem",
    "select",
    "narrow",
    "flatten",
    "squeeze",
}
_VIEWS |= {"unsqueeze", "permute", "transpose", "t", "movedim", "alias", "chunk", "split", "unbind", "slice", "expand"}


def check_methods(model: nn.Module) -> None:
    """Raise CaptureError for a module whose forward or ``__call__`` was replaced, which torch.fx may not notice."""
    for name, module in model.named_modules():
        is_leaf = bool(name) and type(module).__module__.startswith("torch.nn")  # torch.fx never calls its forward
        if is_leaf or isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
            continue
        if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
            place = name or type(model).__name__
            raise CaptureError(f"{place} has a forward or __call__ of its own, which a traced graph would not follow")


def conv_attributes(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Return the settings of every convolution, to compare them after the trace."""
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return {p: tuple(getattr(m, name, None) for name in names) for p, m in model.named_modules() if is_conv(m)}


def buffer_versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the identity and the version of every buffer, which tell if it was replaced or written to."""
    buffers = model.named_buffers()
    return {name: (id(buffer), -1 if buffer.is_inference() else buffer._version) for name, buffer in buffers}


def check_attributes(model: nn.Module, buffers: dict[str, Any], convs: dict[str, Any]) -> None:
    """Raise CaptureError if forward has changed buffers or attributes of modules.

    Args:
        model: the model after the trace.
        buffers: the result of ``buffer_versions`` before the trace.
        convs: the result of ``conv_attributes`` before the trace.
    """
    for changed, now in buffer_versions(model).items():
        if buffers.get(changed) != now:
            raise CaptureError(f"{changed}: forward changes this buffer, which a traced graph would not do")
    for path, attributes in conv_attributes(model).items():
        if convs.get(path) != attributes:
            raise CaptureError(
                f"{path}: forward changes the attributes of this convolution, which tracing would freeze"
            )
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(value)):
                place = path or "the model"
                raise CaptureError(f"{place}: forward sets the attribute {name!r}, which a traced graph would not do")


def check_hooks(tracer: fx.Tracer, model: nn.Module) -> None:
    """Raise CaptureError for hooks on a module that was traced into. The graph would not run them."""
    leaves = {name for name, module in model.named_modules() if name and tracer.is_leaf_module(module, name)}
    for name, module in model.named_modules():
        inside_a_leaf = any(name == leaf or name.startswith(f"{leaf}.") for leaf in leaves)
        if not inside_a_leaf and has_hooks(module):
            raise CaptureError(f"{name or type(model).__name__} has hooks, which a traced graph would not run")


def check_in_place(graph: fx.Graph, overwritten: Mapping[fx.Node, fx.Node]) -> None:
    """Raise CaptureError for in-place writes that a graph would do in another way than forward.

    Args:
        graph: the traced graph.
        overwritten: for each node that ``+=`` or another augmented assignment wrote to, the node of the result. The
            graph has ``+`` there.
    """
    for old, new in overwritten.items():
        if not _is_number(old) and any(user > new for user in old.users):
            raise CaptureError(
                "forward changes a tensor in place and then uses it under another name. A traced graph would use the "
                "tensor before the change"
            )
    for node in graph.nodes:
        if any(map(is_constant, _written(node))):
            raise CaptureError("forward writes to a tensor that it creates. Tracing would freeze that tensor")


def check_parameters(graph: fx.Graph, model: nn.Module) -> None:
    """Raise ParameterChangedError if an operation of the graph writes to a parameter of the model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = {node: str(node.target) for node in graph.nodes if node.op == "get_attr" and node.target in parameters}
    _check_writes(graph, model, known)


def _check_writes(graph: fx.Graph, owner: nn.Module, sources: dict[fx.Node, str]) -> None:
    """Check a graph, and the graphs that its operators take.

    Args:
        graph: the graph.
        owner: the module that has the attributes of the graph.
        sources: the names of the parameters that nodes are, or are views of.
    """
    for node in graph.nodes:
        for operand in _written(node):
            if operand in sources:
                raise ParameterChangedError(sources[operand])
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and first in sources and _is_view(node):
            sources[node] = sources[first]
        if isinstance(node.target, HigherOrderOperator):
            modules = dict(owner.named_children())
            operands = [leaf for leaf in tree_leaves(node.args) if isinstance(leaf, fx.Node)]
            values = [operand for operand in operands if operand.target not in modules]
            for called in (modules[str(operand.target)] for operand in operands if operand.target in modules):
                assert isinstance(called, fx.GraphModule)
                inputs = [inner for inner in called.graph.nodes if inner.op == "placeholder"]
                pairs = zip(reversed(inputs), reversed(values), strict=False)  # a condition comes before the inputs
                _check_writes(called.graph, called, {one: sources[value] for one, value in pairs if value in sources})


def _written(node: fx.Node) -> list[fx.Node]:
    """Return the operands that an operation writes to."""
    if isinstance(node.target, OpOverload):
        values = [node.args[i] for i, _ in written_arguments(node.target) if i < len(node.args)]
    else:
        name = str(getattr(node.target, "__name__", node.target))
        is_write = name.strip("_") in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        values = [*(node.args[:1] if is_write else ()), node.kwargs.get("out")]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, fx.Node)]


def _is_view(node: fx.Node) -> bool:
    """Return whether the result of an operation may use the memory of its first operand."""
    if isinstance(node.target, OpOverload):
        return any(value.alias_info is not None for value in node.target._schema.returns)
    name = str(getattr(node.target, "__name__", node.target))
    return (node.args[1] if name == "getattr" else name) in _VIEWS


def _is_number(node: fx.Node) -> bool:
    """Return whether a value is surely no tensor, such as a size. Augmented assignments do not write to it."""
    if node.op == "placeholder":
        return node.type in (int, float, bool)
    if node.op == "call_method":
        return node.target in _SIZES
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SIZE_ATTRIBUTES
    operands = [operand for operand in tree_leaves((node.args, node.kwargs)) if isinstance(operand, fx.Node)]
    is_arithmetic = getattr(node.target, "__module__", "") in ("_operator", "math", "builtins")
    return node.target is len or (is_arithmetic and bool(operands) and all(map(_is_number, operands)))


def is_constant(node: fx.Node) -> bool:
    """Return whether a node reads a tensor that forward created during the trace."""
    return node.op == "get_attr" and "_tensor_constant" in str(node.target)
