"""The only parser of convolution nodes: which nodes of a graph are convolutions, and why the others are not."""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxfact.conv import ConvSpec
from fxfact.conv_modules import is_conv, layer_of, read_conv
from fxfact.errors import SpecError
from fxfact.graph.base import ConvSite, get_tensor
from fxfact.skip import Skip

_CONV_FUNCTIONS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_TRANSPOSED_FUNCTIONS = {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}


def _conv_arguments(  # noqa: PLR0917 (the parameters of torch.conv1d, conv2d and conv3d, by which a call is bound)
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1
) -> None: ...


_SIGNATURE = inspect.signature(_conv_arguments)


@dataclass(frozen=True, eq=False)
class Match:
    """``verdicts`` says of every node which convolution it calls, or why none."""

    verdicts: dict[fx.Node, ConvSite | Skip]

    @property
    def found(self) -> tuple[ConvSite | Skip, ...]:
        """Every convolution once, in the order of the graph: a site, or why it cannot be one."""
        convs = {found.path if isinstance(found, ConvSite) else found: found for found in self.verdicts.values()}
        return tuple(found for found in convs.values() if isinstance(found, ConvSite) or found.subject)

    @property
    def sites(self) -> tuple[ConvSite, ...]:
        """The convolutions that can be rewritten."""
        return tuple(found for found in self.found if isinstance(found, ConvSite))


def match(graph_module: fx.GraphModule) -> Match:
    """Parse every node. A Skip with a subject is of a convolution, one without is of another node."""
    verdicts: dict[fx.Node, ConvSite | Skip] = {}
    readers = _readers(graph_module)
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        verdict = _parse(graph_module, node)
        verdicts[node] = verdict
        if isinstance(verdict, ConvSite):
            layer = verdict.layer
            bias = [] if verdict.attributes or layer.bias is None else [layer.bias]
            if others := set().union(*(readers[id(tensor)] for tensor in (layer.weight, *bias))):
                verdicts[node] = Skip(f"its weight or bias is also read by {', '.join(sorted(others))}", verdict.path)
            else:
                calls[verdict.path].append(node)
    joined = {path: _joined(path, nodes, verdicts) for path, nodes in calls.items()}
    joined |= {site.path: site for site in _tie([site for site in joined.values() if isinstance(site, ConvSite)])}
    for path, found in joined.items():
        verdicts |= dict.fromkeys(calls[path], found)
    return Match(verdicts)


def _parse(root: fx.GraphModule, node: fx.Node) -> ConvSite | Skip:
    if node.op == "call_module":
        return _parse_module(root, node)
    if node.op == "call_function" and node.target in _TRANSPOSED_FUNCTIONS:
        return Skip("a transposed convolution is not rewritten by this version", node.name)
    if node.op == "call_function" and node.target in _CONV_FUNCTIONS:
        return _parse_function(root, node)
    return Skip(f"{node.op} {node.target} is not a convolution")


def _parse_module(root: fx.GraphModule, node: fx.Node) -> ConvSite | Skip:
    path = str(node.target)
    module = root.get_submodule(path)
    if not is_conv(module):
        inside = [name for name, child in module.named_modules() if is_conv(child)]
        if inside:
            return Skip(f"{type(module).__name__} is a leaf of the trace; inside it is {', '.join(inside)}", path)
        return Skip(f"{type(module).__name__} is not a convolution")
    layer = read_conv(module)
    if isinstance(layer, Skip):
        return replace(layer, subject=path)
    if layer.spec.transposed:
        return Skip("a transposed convolution is not rewritten by this version", path)
    if len(node.all_input_nodes) != 1:
        return Skip("it is called with other arguments than one input", path)
    return ConvSite(path, (node,), layer)


def _parse_function(root: fx.GraphModule, node: fx.Node) -> ConvSite | Skip:
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given: dict[str, Any] = dict(bound.arguments)
    source, weight_node, bias_node = (given.pop(name) for name in ("input", "weight", "bias"))
    tensors = []
    for role, read in (("weight", weight_node), ("bias", bias_node)):
        fixed = isinstance(read, fx.Node) and read.op == "get_attr" and get_tensor(root, str(read.target)) is not None
        if read is not None and not fixed:
            return Skip(f"its {role} is computed in the graph by {getattr(read, 'name', read)}", node.name)
        tensors.append(None if read is None else get_tensor(root, str(read.target)))
    weight, bias = tensors
    if not isinstance(source, fx.Node) or weight is None or any(_holds_node(value) for value in given.values()):
        return Skip("stride, padding, dilation or groups are computed in the graph", node.name)
    attributes = tuple(str(read.target) for read in (weight_node, bias_node) if read is not None)
    order = _CONV_FUNCTIONS[node.target]
    try:
        channels = weight.shape[1] * given["groups"], weight.shape[0]
        spec = ConvSpec.parse(*channels, tuple(weight.shape[2:]), order=order, bias=bias is not None, **given)
    except SpecError as error:
        return Skip(str(error), node.name)
    layer = layer_of(spec, weight, bias)
    path = _path_of(root, attributes[0])
    return replace(layer, subject=path) if isinstance(layer, Skip) else ConvSite(path, (node,), layer, attributes)


def _path_of(root: fx.GraphModule, weight: str) -> str:
    """The path of the module that owns the weight, if it seems to be there for this convolution; else the weight's."""
    owner, _, name = weight.rpartition(".")
    alone = owner and name == "weight" and not list(root.get_submodule(owner).children())
    return owner if alone else weight


def _readers(root: fx.GraphModule) -> dict[int, set[str]]:
    """For every tensor, by identity, the names of the nodes that read it other than as a convolution's weight."""
    readers: dict[int, set[str]] = defaultdict(set)
    for node in root.graph.nodes:
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            for tensor in () if is_conv(module) else module.parameters():
                readers[id(tensor)].add(node.name)
        elif node.op == "get_attr":
            others = [user.name for user in node.users if not _is_weight_of(user, node)]
            if others:
                readers[id(get_tensor(root, str(node.target)))].update(others)
    return readers


def _is_weight_of(user: fx.Node, node: fx.Node) -> bool:
    if user.op != "call_function" or user.target not in _CONV_FUNCTIONS:
        return False
    bound = _SIGNATURE.bind(*user.args, **user.kwargs).arguments
    return [name for name, value in bound.items() if value is node] == ["weight"]


def _joined(path: str, nodes: list[fx.Node], verdicts: dict[fx.Node, ConvSite | Skip]) -> ConvSite | Skip:
    """One site for all calls of one convolution; a Skip where functional calls use one weight differently."""
    calls = [verdict for node in nodes if isinstance(verdict := verdicts[node], ConvSite)]
    first = calls[0]
    if any(site.layer.spec != first.layer.spec or site.attributes != first.attributes for site in calls):
        return Skip("its weight is used by calls with different settings", path)
    return replace(first, nodes=tuple(nodes))


def _tie(sites: list[ConvSite]) -> list[ConvSite]:
    """Mark the sites whose weight another one before them has."""
    first: dict[tuple[int, int], str] = {}
    tied = []
    for site in sites:
        leader = first.setdefault((id(site.layer.weight), site.layer.spec.groups), site.path)
        tied.append(site if leader == site.path else replace(site, tied_to=leader))
    return tied


def _holds_node(value: object) -> bool:
    return isinstance(value, fx.Node) or (isinstance(value, list | tuple) and any(map(_holds_node, value)))
