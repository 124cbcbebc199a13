"""Helpers that read nodes and tensors of a graph module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from fxfact.conv import ConvCall, ConvSite, Sizes, read_call


@dataclass(frozen=True, eq=False, kw_only=True)
class GraphSite(ConvSite):
    """A convolution in a graph, with every node that calls it.

    Attributes:
        nodes: the nodes that call the convolution, in the order of the graph.
        attributes: dotted names of the weight and bias that a functional call reads. Empty for a module call.
    """

    nodes: tuple[fx.Node, ...]
    attributes: tuple[str, ...] = ()


def conv_call(node: fx.Node) -> ConvCall | None:
    """Return the arguments of a functional convolution call, or None for any other node."""
    return read_call(node.target, node.args, node.kwargs) if node.op == "call_function" else None


def conv_input(call: fx.Node) -> fx.Node:
    """Return the input of a convolution node: its first argument, or the keyword argument ``input``."""
    source = call.args[0] if call.args else call.kwargs["input"]
    assert isinstance(source, fx.Node)
    return source


def output_size_of(call: fx.Node) -> Any:
    """Return the output size with which a node calls a transposed convolution module, or None."""
    if call.op != "call_module":
        return None
    return call.args[1] if len(call.args) > 1 else call.kwargs.get("output_size")


def shape_of(node: fx.Node) -> Sizes | None:
    """Return the shape that the node's ``meta`` records under ``val`` or ``tensor_meta``, if any.

    A symbolic size becomes the size of the example. The result is None if a size depends on values.
    """
    recorded = node.meta.get("val", node.meta.get("tensor_meta"))
    shape = getattr(recorded, "shape", None)
    sizes = [size if isinstance(size, int) else size.node.hint for size in shape or ()]
    return None if shape is None or None in sizes else tuple(sizes)


def weight_at(network: nn.Module, path: str) -> Tensor | None:
    """Return the weight of the convolution at ``path``. The path may also name the weight tensor itself."""
    found = get_tensor(network, path)
    return get_tensor(network, f"{path}.weight") if found is None else found


def with_kernels(network: nn.Module, kernels: Mapping[str, Tensor]) -> nn.Module:
    """Replace the weights of the convolutions at these paths, in place, and return the network.

    Kernels are in PyTorch's layout.
    """
    for path, kernel in kernels.items():
        target = path if get_tensor(network, path) is not None else f"{path}.weight"
        owner, _, name = target.rpartition(".")
        module = network.get_submodule(owner)
        for store in (module._parameters, module._buffers, vars(module)):
            store.pop(name, None)
        module.register_parameter(name, nn.Parameter(kernel, requires_grad=False))
    return network


def get_tensor(root: nn.Module, target: str) -> Tensor | None:
    """Return the parameter or buffer at a dotted path, or None if there is none."""
    owner, _, name = target.rpartition(".")
    try:
        found = getattr(root.get_submodule(owner), name, None)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def is_in_called_module(root: fx.GraphModule, name: str) -> bool:
    """Return whether a module that the graph calls holds the parameter or buffer at a dotted path."""
    tensor = get_tensor(root, name)
    called = [root.get_submodule(str(node.target)) for node in root.graph.nodes if node.op == "call_module"]
    return any(held is tensor for module in called for held in (*module.parameters(), *module.buffers()))
