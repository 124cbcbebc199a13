"""The only parser of convolution nodes: which nodes of a graph are convolutions, and why the others are not."""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

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
    verdicts = {node: _parse(graph_module, node) for node in graph_module.graph.nodes}
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node, verdict in verdicts.items():
        if isinstance(verdict, ConvSite):
            calls[verdict.path].append(node)
    for path, nodes in calls.items():
        verdicts |= dict.fromkeys(nodes, _joined(path, nodes, verdicts))
    while left := _read_elsewhere(graph_module, verdicts):  # leaving one alone makes it a reader of what it shares
        verdicts |= left
    for site in _tied(list(dict.fromkeys(v for v in verdicts.values() if isinstance(v, ConvSite)))):
        verdicts |= dict.fromkeys(site.nodes, site)
    return Match(verdicts)


def _parse(root: fx.GraphModule, node: fx.Node) -> ConvSite | Skip:
    if node.op == "call_module":
        return _parse_module(root, node)
    if node.op == "call_function" and node.target in _TRANSPOSED_FUNCTIONS:
        return Skip("a transposed convolution is not rewritten by this version", node.name)
    if node.op == "call_function" and node.target in _CONV_FUNCTIONS:
        return _parse_function(root, node)
    if node.op == "call_function" and "conv" in getattr(node.target, "__name__", ""):
        return Skip(f"this spelling of a convolution, {node.target}, is not rewritten by this version", node.name)
    return Skip(f"{node.op} {node.target} is not a convolution")


def _parse_module(root: fx.GraphModule, node: fx.Node) -> ConvSite | Skip:
    path = str(node.target)
    module = root.get_submodule(path)
    if not is_conv(module):
        inside = [name for name, child in module.named_modules() if is_conv(child) or _is_scripted_conv(child)]
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


def _read_elsewhere(root: fx.GraphModule, verdicts: dict[fx.Node, ConvSite | Skip]) -> dict[fx.Node, Skip]:
    """The sites whose weight or bias something reads that is no site itself: they must keep it."""
    readers = _readers(root, verdicts)
    left: dict[fx.Node, Skip] = {}
    groups: dict[int, set[int]] = defaultdict(set)
    sites = {node: site for node, site in verdicts.items() if isinstance(site, ConvSite)}
    for site in sites.values():
        groups[id(site.layer.weight)].add(site.layer.spec.groups)
    for node, site in sites.items():
        if len(groups[id(site.layer.weight)]) > 1:
            left[node] = Skip("its weight is used by calls with different settings", site.path)
        else:
            bias = [] if site.attributes or site.layer.bias is None else [site.layer.bias]
            if others := set().union(*(readers[id(tensor)] for tensor in (site.layer.weight, *bias))):
                left[node] = Skip(f"its weight or bias is also read by {', '.join(sorted(others))}", site.path)
    return left


def _readers(root: fx.GraphModule, verdicts: dict[fx.Node, ConvSite | Skip]) -> dict[int, set[str]]:
    """For every tensor, by identity, the names of the nodes that read it other than as the weight of a site."""
    readers: dict[int, set[str]] = defaultdict(set)
    for node in root.graph.nodes:
        if node.op == "call_module" and not isinstance(verdicts[node], ConvSite):
            for tensor in root.get_submodule(str(node.target)).parameters():
                readers[id(tensor)].add(node.name)
        elif node.op == "get_attr":
            sites = [user for user in node.users if isinstance(verdicts[user], ConvSite) and _is_weight_of(user, node)]
            others = {user.name for user in node.users if user not in sites}
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


def _tied(sites: list[ConvSite]) -> list[ConvSite]:
    """Mark the sites whose weight another one before them has."""
    first: dict[int, str] = {}
    leaders = [first.setdefault(id(site.layer.weight), site.path) for site in sites]
    return [
        site if leader == site.path else replace(site, tied_to=leader)
        for site, leader in zip(sites, leaders, strict=True)
    ]


def _is_scripted_conv(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) and str(module.original_name).startswith("Conv")


def _holds_node(value: object) -> bool:
    return isinstance(value, fx.Node) or (isinstance(value, list | tuple) and any(map(_holds_node, value)))
