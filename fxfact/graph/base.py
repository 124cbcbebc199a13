"""Helpers that read nodes and tensors of a graph module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfact.conv import ConvCall, ConvSite, Sizes, read_call

_SWAPS = ([0, 1], [1, 0], [-2, -1], [-1, -2])  # the axes of a matrix, for functions that swap two axes
_ALWAYS_TRANSPOSE: tuple[Any, ...] = ("t", torch.t, torch.ops.aten.t.default, torch.ops.aten.numpy_T.default)
_SWAP_AXES: tuple[Any, ...] = ("transpose", "swapaxes", torch.transpose, torch.swapaxes, torch.ops.aten.transpose.int)
_PERMUTE: tuple[Any, ...] = ("permute", torch.permute, torch.ops.aten.permute.default)
_REPEAT: tuple[Any, ...] = (torch.ops.aten.expand.default, torch.ops.aten.view.default, torch.ops.aten.reshape.default)


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
    """Return the arguments of a functional convolution call, or None for any other node.

    If the graph transposes the weight of a linear layer first, or repeats it for a batch, the weight is the node before
    that. A matrix product is a linear layer only if its second factor is a weight of the model or a graph input.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    function = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
    call = read_call(function, node.args, node.kwargs)
    while call is not None and call.is_linear and (source := viewed_by(call.weight)) is not None:
        transposes = transposed_by(call.weight) is not None
        call = replace(call, weight=source, transposed=call.transposed != transposes)
    if call is not None and call.is_product:
        is_held = isinstance(call.weight, fx.Node) and call.weight.op in ("get_attr", "placeholder")
        return call if is_held else None
    return call


def transposed_by(node: object) -> fx.Node | None:
    """Return the node of the matrix that a node transposes, or None if it does something else."""
    if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node) or node.kwargs:
        return None
    source, *rest = node.args
    axes = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
    if node.target in _ALWAYS_TRANSPOSE:
        transposes = not rest
    elif node.target in _SWAP_AXES:
        transposes = axes in _SWAPS
    elif node.target in _PERMUTE:
        transposes = axes == [1, 0]
    else:
        transposes = node.target is getattr and rest in (["T"], ["mT"])
    return source if transposes and isinstance(source, fx.Node) else None


def viewed_by(node: object) -> fx.Node | None:
    """Return the node of the matrix that a node transposes, or repeats for every matrix of a batch, or None."""
    if not isinstance(node, fx.Node) or node.target not in _REPEAT or len(node.args) != 2:
        return transposed_by(node)
    source: Any = node.args[0]
    sizes: Any = node.args[1]
    is_repeated = isinstance(source, fx.Node) and isinstance(sizes, list | tuple) and len(sizes) >= 3
    if not is_repeated or node.target is _REPEAT[0]:
        return source if is_repeated and isinstance(source, fx.Node) else None
    before = source.args[1] if viewed_by(source) is not None and len(source.args) == 2 else ()
    return source if list(before)[-2:] == list(sizes)[-2:] else None


def users_of(source: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that use the matrix of a node, or what ``viewed_by`` takes for it."""
    for user in source.users:
        if viewed_by(user) is source:
            yield from users_of(user)
        else:
            yield user


def erase_unread(node: fx.Node) -> None:
    """Erase a node that reads a matrix, or a transpose of one, and what it was made from, unless they have users."""
    source: fx.Node | None = node
    while source is not None and not source.users:
        before = viewed_by(source)
        if source.op != "get_attr" and before is None:
            return
        source.graph.erase_node(source)
        source = before


def conv_input(call: fx.Node) -> fx.Node:
    """Return the input of a convolution node."""
    function = conv_call(call)
    if function is not None:
        source = function.input
    else:
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
