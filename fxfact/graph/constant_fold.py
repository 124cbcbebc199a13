"""Weights that a graph computes from parameters alone, such as standardised ones, become parameters themselves."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfact.graph.base import conv_call, get_tensor, held_by_called_module


def fold_computed_weights(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Replace, in place, every convolution's weight that is the same in every call; returns the names folded.

    What computed it is dropped, and its first parameter gives the name. A weight that is drawn anew at every call, or
    that depends on the input, stays. The caller recompiles.
    """
    folded = []
    for node in list(graph_module.graph.nodes):
        call = conv_call(node)
        made = call.weight if call is not None else None
        if isinstance(made, fx.Node) and made.op != "get_attr" and (makers := _makers(made)):
            with torch.no_grad(), torch.random.fork_rng():
                value, again = _value(graph_module, makers), _value(graph_module, makers)
            if isinstance(value, Tensor) and isinstance(again, Tensor) and torch.equal(value, again):
                folded.append(_install(graph_module, made, makers, value))
    return tuple(folded)


def _makers(made: fx.Node) -> list[fx.Node]:
    """The nodes that compute it, in order; none where they need more than parameters and functions, or where others
    use what they make: in place, it might be.
    """
    wanted, found = [made], set()
    while wanted:
        node = wanted.pop()
        if node.op not in ("get_attr", "call_function", "call_method"):
            return []
        if node not in found:
            found.add(node)
            wanted += node.all_input_nodes
    for node in found:
        for user in node.users:
            call = conv_call(user)
            convolved = node is made and call is not None and call.weight is made
            if node.op != "get_attr" and user not in found and not convolved:
                return []
    return [node for node in made.graph.nodes if node in found]


def _value(root: fx.GraphModule, makers: list[fx.Node]) -> Any:
    values: dict[fx.Node, Any] = {}
    for node in makers:
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
    return values[makers[-1]]


def _install(root: fx.GraphModule, made: fx.Node, makers: list[fx.Node], value: Tensor) -> str:
    source = next((node for node in makers if node.op == "get_attr"), made)
    name = str(source.target) if source.op == "get_attr" else made.name
    readers = [node for node in root.graph.nodes if node.op == "get_attr" and node.target == name]
    used = any(user not in makers for reader in readers for user in reader.users)
    called = held_by_called_module(root, name)
    if used or called:
        stem = name.rpartition(".")[0] if called else name  # a module that is called may itself be factorized
        names = (f"{stem}_folded_{k}" for k in count())
        name = next(new for new in names if get_tensor(root, new) is None)
    owner, _, own_name = name.rpartition(".")
    sources = [get_tensor(root, str(node.target)) for node in makers if node.op == "get_attr"]
    trainable = any(tensor is not None and tensor.requires_grad for tensor in sources)
    module = root.get_submodule(owner)
    for held in (module._parameters, module._buffers):
        held.pop(own_name, None)
    module._non_persistent_buffers_set.discard(own_name)
    module.register_parameter(own_name, nn.Parameter(value.contiguous(), requires_grad=trainable))
    with root.graph.inserting_before(made):
        constant = root.graph.get_attr(name)
    constant.meta = dict(made.meta)
    made.replace_all_uses_with(constant)
    for node in reversed(makers):
        if not node.users:
            root.graph.erase_node(node)
            if node.op == "get_attr" and node.target != name:
                _drop_unread(root, str(node.target))
    return name


def _drop_unread(root: fx.GraphModule, name: str) -> None:
    read = any(node.op == "get_attr" and node.target == name for node in root.graph.nodes)
    if not read and not held_by_called_module(root, name):
        owner, _, own_name = name.rpartition(".")
        delattr(root.get_submodule(owner), own_name)
