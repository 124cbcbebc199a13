"""Turns parameters that are graph inputs, as Dynamo passes them, into attributes for a rewrite, and back."""

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
    """A copy of a graph in which the parameters and buffers of convolutions are attributes instead of inputs.

    Attributes:
        graph_module: the copy.
        input_index: for each attribute, by name, the index of the input that it was.
    """

    graph_module: fx.GraphModule
    input_index: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Factor:
    """An input that a rewrite adds: the weight of one stage of a factorized convolution.

    Attributes:
        path: the path of the convolution.
        stage: the index of the stage among the stages that have a weight.
    """

    path: str
    stage: int


def lift(original: fx.GraphModule, values: Sequence[Any]) -> Lifted:
    """Copy a graph and make the inputs that are weights or biases of convolutions attributes.

    Args:
        original: the graph that Dynamo captured. It is not changed.
        values: one value for each placeholder.

    Returns:
        The copy, with shapes recorded at the inputs of convolutions.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(original.graph, copies))
    attributes = {
        str(node.target): _module_or_tensor(original, str(node.target))
        for node in original.graph.nodes
        if node.op in ("get_attr", "call_module")
    }
    input_index: dict[str, int] = {}
    calls = [(node, call) for node in graph.nodes if (call := conv_call(node))]
    read = {node for _, call in calls for node in (call.weight, call.bias)}
    placeholders = [node for node in original.graph.nodes if node.op == "placeholder"]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for index, (old, value) in enumerate(zip(placeholders, values, strict=True)):
        path = _path_of(old)
        held = isinstance(value, nn.Parameter) or (path is not None and not isinstance(value, FakeTensor))
        if copies[old] in read and held:
            name = str(old.target) if path is None or path in attributes else path
            input_index[name], attributes[name] = index, value
            with graph.inserting_before(first):
                copies[old].replace_all_uses_with(graph.get_attr(name))
    for node, _ in calls:
        value = conv_input(node).meta.get("example_value")
        if isinstance(value, FakeTensor):
            conv_input(node).meta["tensor_meta"] = _extract_tensor_metadata(value)
    return Lifted(fx.GraphModule(attributes, graph), input_index)


def lower(lifted: Lifted, rewritten: fx.GraphModule, sites: Sequence[GraphSite]) -> tuple[fx.GraphModule, list[Factor]]:
    """Make the parameters of a rewritten graph inputs again.

    Args:
        lifted: the graph before the rewrite.
        rewritten: the graph after the rewrite.
        sites: the convolutions that were rewritten.

    Returns:
        The graph module, and the inputs that follow those of the original graph.
    """
    graph = rewritten.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    factors, last = list[Factor](), inputs[-1]
    stages: dict[str, tuple[nn.Module, fx.Node, fx.Node | None]] = {}
    for site in sites:
        children = rewritten.get_submodule(site.path).named_children()
        convs = [(name, m) for name, m in children if name.isdecimal() and is_conv(m)]
        for index, (name, module) in enumerate(convs):
            with graph.inserting_after(last):
                last = graph.placeholder(f"fxfact_factor_{len(factors)}")
            factors.append(Factor(site.path, index))
            has_bias = module.bias is not None
            bias = inputs[lifted.input_index[site.attributes[1]]] if has_bias else None
            stages[f"{site.path}.{name}"] = (module, last, bias)
    for node in list(graph.nodes):
        node.meta.pop("tensor_meta", None)
        if node.op == "get_attr" and node.target in lifted.input_index:
            node.replace_all_uses_with(inputs[lifted.input_index[str(node.target)]])
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
    """Return the path at which Dynamo found a parameter or buffer in the model, or None for any other input."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name: str | Callable[[], str] = getattr(source, "name", "")
    parts = _IN_SOURCE.findall(name() if callable(name) else name)
    return ".".join(parts) or None


def _module_or_tensor(root: nn.Module, target: str) -> nn.Module | Tensor:
    owner, _, name = target.rpartition(".")
    found: nn.Module | Tensor = getattr(root.get_submodule(owner), name)
    return found
