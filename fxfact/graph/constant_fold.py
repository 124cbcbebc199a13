"""Folds weights that a graph computes from parameters alone, such as standardized weights, into parameters."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfact.graph.base import conv_call, get_tensor, is_in_called_module


def fold_computed_weights(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Replace every computed weight of a convolution by a parameter with its value, in place.

    The new parameter gets the name of the first parameter that the weight was computed from. The nodes that computed it
    are removed. A weight that is random or depends on the input stays. Recompile the graph module afterwards.

    Args:
        graph_module: a private copy of the network.

    Returns:
        The names of the new parameters.
    """
    folded = []
    for node in list(graph_module.graph.nodes):
        call = conv_call(node)
        weight = call.weight if call is not None else None
        if isinstance(weight, fx.Node) and weight.op != "get_attr" and (computing := _computing_nodes(weight)):
            with torch.no_grad(), torch.random.fork_rng():
                value, again = _evaluate(graph_module, computing), _evaluate(graph_module, computing)
            if isinstance(value, Tensor) and isinstance(again, Tensor) and torch.equal(value, again):
                folded.append(_replace_by_parameter(graph_module, weight, computing, value))
    return tuple(folded)


def _computing_nodes(weight: fx.Node) -> list[fx.Node]:
    """Return the nodes that compute a weight, in order.

    The result is empty if the weight needs more than parameters and functions. It is also empty if other nodes use an
    intermediate value, because they might change it in place.
    """
    waiting, found = [weight], set()
    while waiting:
        node = waiting.pop()
        if node.op not in ("get_attr", "call_function", "call_method"):
            return []
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    for node in found:
        for user in node.users:
            call = conv_call(user)
            convolved = node is weight and call is not None and call.weight is weight
            if node.op != "get_attr" and user not in found and not convolved:
                return []
    return [node for node in weight.graph.nodes if node in found]


def _evaluate(root: fx.GraphModule, computing: list[fx.Node]) -> Any:
    values: dict[fx.Node, Any] = {}
    for node in computing:
        if node.op == "get_attr":
            held = get_tensor(root, str(node.target))
            values[node] = None if held is None else held.detach().clone()
            continue
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        if callable(node.target):
            values[node] = node.target(*args, **kwargs)
        else:
            values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
    return values[computing[-1]]


def _replace_by_parameter(root: fx.GraphModule, weight: fx.Node, computing: list[fx.Node], value: Tensor) -> str:
    source = next((node for node in computing if node.op == "get_attr"), weight)
    name = str(source.target) if source.op == "get_attr" else weight.name
    readers = [node for node in root.graph.nodes if node.op == "get_attr" and node.target == name]
    used = any(user not in computing for reader in readers for user in reader.users)
    called = is_in_called_module(root, name)
    if used or called:
        stem = name.rpartition(".")[0] if called else name  # a module that is called may itself be factorized
        names = (f"{stem}_folded_{k}" for k in count())
        name = next(new for new in names if get_tensor(root, new) is None)
    owner, _, own_name = name.rpartition(".")
    sources = [get_tensor(root, str(node.target)) for node in computing if node.op == "get_attr"]
    trainable = any(tensor is not None and tensor.requires_grad for tensor in sources)
    module = root.get_submodule(owner)
    for held in (module._parameters, module._buffers):
        held.pop(own_name, None)
    module._non_persistent_buffers_set.discard(own_name)
    module.register_parameter(own_name, nn.Parameter(value.contiguous(), requires_grad=trainable))
    with root.graph.inserting_before(weight):
        constant = root.graph.get_attr(name)
    constant.meta = dict(weight.meta)
    weight.replace_all_uses_with(constant)
    for node in reversed(computing):
        if not node.users:
            root.graph.erase_node(node)
            if node.op == "get_attr" and node.target != name:
                _drop_unread(root, str(node.target))
    return name


def _drop_unread(root: fx.GraphModule, name: str) -> None:
    read = any(node.op == "get_attr" and node.target == name for node in root.graph.nodes)
    if not read and not is_in_called_module(root, name):
        owner, _, own_name = name.rpartition(".")
        delattr(root.get_submodule(owner), own_name)
