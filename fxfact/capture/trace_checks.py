"""What a traced graph would lose, looked for in the model, and in what tracing made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from fxfact.conv import has_hooks, is_conv
from fxfact.errors import CaptureError

_IN_PLACE = {"setitem", *(f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow"))}


def check_methods(model: nn.Module) -> None:
    """Raise CaptureError for a module that is not called as its class says, which torch.fx would not always see."""
    for name, module in model.named_modules():
        of_torch = bool(name) and type(module).__module__.startswith("torch.nn")  # whose forward torch.fx follows
        if of_torch or isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
            continue
        if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
            place = name or type(model).__name__
            raise CaptureError(f"{place} has a forward or __call__ of its own, which a traced graph would not follow")


def conv_attributes(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """How every convolution of a model is set, for ``check_attributes``."""
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return {p: tuple(getattr(m, name) for name in names) for p, m in model.named_modules() if is_conv(m)}


def buffers_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """What tells a buffer that was replaced or written to: its identity and its version."""
    buffers = model.named_buffers()
    return {name: (id(buffer), -1 if buffer.is_inference() else buffer._version) for name, buffer in buffers}


def check_attributes(model: nn.Module, buffers: dict[str, Any], convs: dict[str, Any]) -> None:
    """Raise CaptureError for what forward has changed in the modules: a traced graph would no longer do it."""
    for changed, now in buffers_of(model).items():
        if buffers.get(changed) != now:
            raise CaptureError(f"{changed}: forward changes this buffer, which a traced graph would no longer do")
    for path, attributes in conv_attributes(model).items():
        if convs.get(path) != attributes:
            raise CaptureError(
                f"{path}: forward changes the attributes of this convolution, which a graph would freeze"
            )
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(value)):
                raise CaptureError(
                    f"{path or 'the model'}: forward sets the attribute {name!r}, which a graph would not"
                )


def check_hooks(tracer: fx.Tracer, model: nn.Module) -> None:
    """Raise CaptureError for a hook on a module that was traced through: the graph would not run it."""
    leaves = {name for name, module in model.named_modules() if name and tracer.is_leaf_module(module, name)}
    for name, module in model.named_modules():
        inside_a_leaf = any(name == leaf or name.startswith(f"{leaf}.") for leaf in leaves)
        if not inside_a_leaf and has_hooks(module):
            raise CaptureError(f"{name or type(model).__name__} has hooks, which a traced graph would not run")


def check_overwritten(graph: fx.Graph, overwritten: Mapping[fx.Node, fx.Node]) -> None:
    """Raise CaptureError where what ``+=`` and its like write to is used further, under another name, and for writing
    to a tensor that forward makes: a graph makes it once.
    """
    for old, new in overwritten.items():
        if any(user > new for user in old.users):
            raise CaptureError("forward changes a tensor in place that it uses further, which a traced graph would not")
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        name = getattr(node.target, "__name__", str(node.target))
        writes = name.strip("_") in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if writes and isinstance(first, fx.Node) and is_constant(first):
            raise CaptureError("forward writes to a tensor that it makes anew in every call, a traced graph but once")


def is_constant(node: fx.Node) -> bool:
    """Whether a graph reads a tensor there that forward made."""
    return node.op == "get_attr" and "_tensor_constant" in str(node.target)
