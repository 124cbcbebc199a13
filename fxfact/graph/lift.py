"""Graphs whose parameters are inputs, as Dynamo captures them: attributes for a rewrite, and behind it inputs again."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from fxfact.conv import is_conv, write_call
from fxfact.graph.base import GraphSite, conv_call, conv_input

_IN_SOURCE = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")


@dataclass(frozen=True, eq=False)
class Lifted:
    """A copy of a graph in which the parameters and buffers that convolutions read are attributes; ``places`` are those
    of the inputs that they were, by name.
    """

    graph_module: fx.GraphModule
    places: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Factor:
    """A further input: the weight of a stage (counted among those that have one) of the convolution at ``path``."""

    path: str
    stage: int


def lift(original: fx.GraphModule, values: Sequence[Any]) -> Lifted:
    """``values`` are those of the placeholders. Shapes of what convolutions are called on are recorded."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(original.graph, copies))
    attributes = {
        str(node.target): _at(original, str(node.target))
        for node in original.graph.nodes
        if node.op in ("get_attr", "call_module")
    }
    places: dict[str, int] = {}
    calls = [(node, call) for node in graph.nodes if (call := conv_call(node))]
    read = {node for _, call in calls for node in (call.weight, call.bias)}
    placeholders = [node for node in original.graph.nodes if node.op == "placeholder"]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for index, (old, value) in enumerate(zip(placeholders, values, strict=True)):
        path = _path_of(old)
        held = isinstance(value, nn.Parameter) or (path is not None and not isinstance(value, FakeTensor))
        if copies[old] in read and held:
            name = str(old.target) if path is None or path in attributes else path
            places[name], attributes[name] = index, value
            with graph.inserting_before(first):
                copies[old].replace_all_uses_with(graph.get_attr(name))
    for node, _ in calls:
        value = conv_input(node).meta.get("example_value")
        if isinstance(value, FakeTensor):
            conv_input(node).meta["tensor_meta"] = _extract_tensor_metadata(value)
    return Lifted(fx.GraphModule(attributes, graph), places)


def lower(lifted: Lifted, rewritten: fx.GraphModule, sites: Sequence[GraphSite]) -> tuple[fx.GraphModule, list[Factor]]:
    """What became of a lifted graph, its ``sites`` rewritten, with its parameters as inputs again, and what the further
    inputs behind those are.
    """
    graph = rewritten.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    factors, last = list[Factor](), inputs[-1]
    stages: dict[str, tuple[nn.Module, fx.Node, fx.Node | None]] = {}
    for site in sites:
        children = [(name, m) for name, m in rewritten.get_submodule(site.path).named_children() if is_conv(m)]
        for index, (name, module) in enumerate(children):
            with graph.inserting_after(last):
                last = graph.placeholder(f"fxfact_factor_{len(factors)}")
            factors.append(Factor(site.path, index))
            has_bias = module.bias is not None
            bias = inputs[lifted.places[site.attributes[1]]] if has_bias else None
            stages[f"{site.path}.{name}"] = (module, last, bias)
    for node in list(graph.nodes):
        node.meta.pop("tensor_meta", None)
        if node.op == "get_attr" and node.target in lifted.places:
            node.replace_all_uses_with(inputs[lifted.places[str(node.target)]])
            graph.erase_node(node)
        if node.op == "call_module" and node.target in stages:
            module, weight, bias = stages[str(node.target)]
            function, settings = write_call(module)
            with graph.inserting_before(node):
                call = graph.call_function(function, (conv_input(node), weight, bias, *settings))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
    return fx.GraphModule(rewritten, graph), factors


def _path_of(placeholder: fx.Node) -> str | None:
    """Where the model holds the parameter or buffer, as Dynamo says; None of what it does not hold."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name: str | Callable[[], str] = getattr(source, "name", "")
    parts = _IN_SOURCE.findall(name() if callable(name) else name)
    return ".".join(parts) or None


def _at(root: nn.Module, target: str) -> nn.Module | Tensor:
    owner, _, name = target.rpartition(".")
    found: nn.Module | Tensor = getattr(root.get_submodule(owner), name)
    return found
