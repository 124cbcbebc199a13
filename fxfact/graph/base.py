"""What the graph code hands around."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from fxfact.conv import ConvCall, ConvSite, Sizes, read_call


@dataclass(frozen=True, eq=False, kw_only=True)
class GraphSite(ConvSite):
    """Where a convolution lives in a graph: every node that calls it.

    ``attributes`` names the tensors that a functional call reads from the module tree; empty for a module call.
    """

    nodes: tuple[fx.Node, ...]
    attributes: tuple[str, ...] = ()


def conv_call(node: fx.Node) -> ConvCall | None:
    """The arguments of the convolution that this node calls by function; None where it calls another, or a module."""
    return read_call(node.target, node.args, node.kwargs) if node.op == "call_function" else None


def conv_input(call: fx.Node) -> fx.Node:
    """What a convolution is called on: its first argument, which may be given as ``input=``."""
    source = call.args[0] if call.args else call.kwargs["input"]
    assert isinstance(source, fx.Node)
    return source


def shape_of(node: fx.Node) -> Sizes | None:
    """The shape that the node's ``meta`` records (``val`` or ``tensor_meta``), if it does; of a symbolic size what the
    example had, and nothing where a size depends on values.
    """
    recorded = node.meta.get("val", node.meta.get("tensor_meta"))
    shape = getattr(recorded, "shape", None)
    sizes = [size if isinstance(size, int) else size.node.hint for size in shape or ()]
    return None if shape is None or None in sizes else tuple(sizes)


def weight_at(network: nn.Module, path: str) -> Tensor | None:
    """The weight of the convolution at a path, which is the path itself where a bare tensor is convolved with."""
    found = get_tensor(network, path)
    return get_tensor(network, f"{path}.weight") if found is None else found


def get_tensor(root: nn.Module, target: str) -> Tensor | None:
    """The parameter or buffer at a dotted path, or None where there is none."""
    owner, _, name = target.rpartition(".")
    try:
        found = getattr(root.get_submodule(owner), name, None)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def held_by_called_module(root: fx.GraphModule, name: str) -> bool:
    """Whether a module that is called holds the parameter or buffer at a dotted path."""
    tensor = get_tensor(root, name)
    called = [root.get_submodule(str(node.target)) for node in root.graph.nodes if node.op == "call_module"]
    return any(held is tensor for module in called for held in (*module.parameters(), *module.buffers()))
