"""Finds the convolutions in a graph. No other module parses convolution nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, fx, nn

from fxfact.conv import (
    ATTENTION_ADVICE,
    TRANSPOSED_TYPES,
    ConvCall,
    ConvSpec,
    Sizes,
    Skip,
    is_conv,
    looks_like_conv,
    mark_tied,
    read_call,
    spec_of,
    why_unsupported,
    why_weight_unsupported,
)
from fxfact.errors import SpecError
from fxfact.graph.base import GraphSite, conv_call, conv_input, get_tensor, shape_of, users_of


@dataclass(frozen=True, eq=False)
class Match:
    """The convolutions of a graph.

    Attributes:
        verdicts: for every node the convolution that it calls, or a Skip that says why it calls none. Only a Skip that
            is about a convolution has a subject.
    """

    verdicts: Mapping[fx.Node, GraphSite | Skip]

    @property
    def found(self) -> tuple[GraphSite | Skip, ...]:
        """Every convolution once, in the order of the graph: a site, or a Skip with the reason why it is none."""
        convs = {found.path if isinstance(found, GraphSite) else found: found for found in self.verdicts.values()}
        return tuple(found for found in convs.values() if isinstance(found, GraphSite) or found.subject)

    @property
    def sites(self) -> tuple[GraphSite, ...]:
        """The convolutions that can be rewritten."""
        return tuple(found for found in self.found if isinstance(found, GraphSite))


def match(graph_module: fx.GraphModule) -> Match:
    """Find every convolution in a graph.

    Args:
        graph_module: the graph. Only its nodes, modules and tensors are read.

    Returns:
        A verdict for every node.
    """
    verdicts = {node: _parse(graph_module, node) for node in graph_module.graph.nodes}
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node, verdict in verdicts.items():
        if isinstance(verdict, GraphSite):
            calls[verdict.path].append(node)
    for path, nodes in calls.items():
        verdicts |= dict.fromkeys(nodes, _merge_calls(path, nodes, verdicts))
    while skipped := _read_elsewhere(graph_module, verdicts):  # a skipped convolution is a reader of what it shares
        verdicts |= skipped
    for site in mark_tied(list(dict.fromkeys(v for v in verdicts.values() if isinstance(v, GraphSite)))):
        verdicts |= dict.fromkeys(site.nodes, site)
    return Match(verdicts)


def _parse(root: fx.GraphModule, node: fx.Node) -> GraphSite | Skip:
    if node.op == "call_module":
        return _parse_module(root, node)
    if call := conv_call(node):
        return _parse_function(root, node, call)
    if node.op == "get_attr" and (inside := _convs_in_region(root, str(node.target))):
        reason = f"an operator runs this region of the graph as a whole; inside it is {', '.join(inside)}"
        return Skip(reason, str(node.target))
    if node.op == "call_function" and looks_like_conv(node.target):
        name = getattr(node.target, "__name__", node.target)
        return Skip(f"{name} is a convolution that fxfact does not support", node.name)
    return Skip(f"{node.op} {node.target} is not a convolution")


def _parse_module(root: fx.GraphModule, node: fx.Node) -> GraphSite | Skip:
    path = str(node.target)
    module = root.get_submodule(path)
    if not is_conv(module):
        inside = [name for name, child in module.named_modules() if is_conv(child) or _is_foreign_conv(child)]
        if inside == [""]:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            return Skip(f"it is a {kind}, not a torch.nn.Conv or torch.nn.Linear", path)
        if inside:
            has_attention = any(isinstance(child, nn.MultiheadAttention) for child in module.modules())
            advice = f". {ATTENTION_ADVICE}" if has_attention else ""
            reason = f"{type(module).__name__} is a leaf of the trace; inside it is {', '.join(inside)}{advice}"
            return Skip(reason, path)
        return Skip(f"{type(module).__name__} is not a convolution")
    if reason := why_unsupported(module) or _why_call_unsupported(module, node):
        return Skip(reason, path)
    return GraphSite(
        path=path,
        spec=spec_of(module),
        weight=cast(Tensor, module.weight),
        bias=cast("Tensor | None", module.bias),
        input_shapes=_input_shapes([node]),
        nodes=(node,),
    )


def _why_call_unsupported(module: nn.Module, node: fx.Node) -> str:
    """Return why stages cannot replace this call of a convolution module, or "" if they can."""
    names = ("input", "output_size") if isinstance(module, TRANSPOSED_TYPES) else ("input",)
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if len(node.args) > len(names) or not arguments.keys() <= {*names}:
        return "it is called with other arguments than its input"
    if not isinstance(arguments.get("input"), fx.Node):
        return "its input is no value of the graph"
    if any(name.isdecimal() for name, _ in module.named_children()):
        return "it holds modules with the names that its stages would have"
    return ""


def _parse_function(root: fx.GraphModule, node: fx.Node, call: ConvCall) -> GraphSite | Skip:
    if call.is_product and not _is_parameter(root, call.weight):
        return Skip(f"{node.op} {node.target} is not a convolution")
    tensors = []
    for role, read in (("weight", call.weight), ("bias", call.bias)):
        fixed = isinstance(read, fx.Node) and read.op == "get_attr" and get_tensor(root, str(read.target)) is not None
        if read is not None and not fixed:
            given = isinstance(read, fx.Node) and read.op == "placeholder"
            how = "the graph's input" if given else "computed in the graph by"
            name = str(getattr(read, "name", read))
            advice = ": factorize the model before you prepare it for quantization" if "fake_quant" in name else ""
            return Skip(f"its {role} is {how} {name}{advice}", node.name)
        tensors.append(None if read is None else get_tensor(root, str(read.target)))
    weight, bias = tensors
    if not isinstance(call.input, fx.Node) or weight is None or any(map(_holds_node, call.settings.values())):
        return Skip("stride, padding, dilation or groups are computed in the graph", node.name)
    attributes = tuple(str(read.target) for read in (call.weight, call.bias) if read is not None)
    path = _path_of(root, attributes[0])
    try:
        spec = call.spec_for(weight.shape, bias=bias is not None)
    except SpecError as error:
        return Skip(str(error), node.name)
    if reason := why_weight_unsupported(weight) or _why_bias_unsupported(bias, spec):
        return Skip(reason, path)
    return GraphSite(
        path=path,
        spec=spec,
        weight=weight,
        bias=bias,
        input_shapes=_input_shapes([node]),
        nodes=(node,),
        attributes=attributes,
    )


def _is_parameter(root: fx.GraphModule, weight: fx.Node) -> bool:
    """Return whether a factor of a matrix product is a parameter, and not another tensor or an input of the graph."""
    tensor = get_tensor(root, str(weight.target)) if weight.op == "get_attr" else None
    return isinstance(tensor, nn.Parameter) and tensor.ndim == 2


def _why_bias_unsupported(bias: Tensor | None, spec: ConvSpec) -> str:
    """Return why a tensor is no bias, but another summand of ``addmm``, or "" if it is one."""
    found = None if bias is None else tuple(bias.shape)
    return "" if found in (None, (spec.out_channels,)) else f"its bias has the shape {found}, not one value per output"


def _convs_in_region(root: fx.GraphModule, target: str) -> list[str]:
    """Return the convolutions in a graph that a higher-order operator runs, such as a part without gradients."""
    owner, _, name = target.rpartition(".")
    region = getattr(root.get_submodule(owner), name, None)
    if not isinstance(region, fx.GraphModule):
        return []
    nodes = region.graph.nodes
    own = [node.name for node in nodes if node.op == "call_function" and _names_conv(node)]
    nested = [_convs_in_region(region, str(node.target)) for node in nodes if node.op == "get_attr"]
    return own + [f"{target}.{inner}" for names in nested for inner in names]


def _names_conv(node: fx.Node) -> bool:
    """Return whether a node calls a function whose name is that of a convolution or a linear layer."""
    call = read_call(node.target, node.args, node.kwargs)
    return looks_like_conv(node.target) or (call is not None and not call.is_product)


def _path_of(root: fx.GraphModule, weight: str) -> str:
    """Return the path of the module that owns the weight if it can hold stages, otherwise the weight's path."""
    owner, _, name = weight.rpartition(".")
    children = root.get_submodule(owner).named_children() if owner else ()
    holds_stages = owner and name == "weight" and not any(child.isdecimal() for child, _ in children)
    return owner if holds_stages else weight


def _input_shapes(nodes: list[fx.Node]) -> tuple[Sizes, ...] | None:
    shapes = [shape for node in nodes if (shape := shape_of(conv_input(node))) is not None]
    return tuple(shapes) if len(shapes) == len(nodes) else None


def _read_elsewhere(root: fx.GraphModule, verdicts: Mapping[fx.Node, GraphSite | Skip]) -> dict[fx.Node, Skip]:
    """Return a Skip for every site whose weight or bias is also read by a node that is no site."""
    readers = _readers(root, verdicts)
    skipped: dict[fx.Node, Skip] = {}
    kinds: dict[int, set[tuple[int, bool]]] = defaultdict(set)
    sites = {node: site for node, site in verdicts.items() if isinstance(site, GraphSite)}
    for site in sites.values():
        kinds[id(site.weight)].add((site.spec.groups, site.spec.transposed))
    for node, site in sites.items():
        if len(kinds[id(site.weight)]) > 1:
            skipped[node] = Skip("its weight is used by calls with different settings", site.path)
        else:
            bias = [] if site.attributes or site.bias is None else [site.bias]
            if others := set().union(*(readers[id(tensor)] for tensor in (site.weight, *bias))):
                skipped[node] = Skip(f"its weight or bias is also read by {', '.join(sorted(others))}", site.path)
    return skipped


def _readers(root: fx.GraphModule, verdicts: Mapping[fx.Node, GraphSite | Skip]) -> dict[int, set[str]]:
    """Map the id of every tensor to the names of the nodes that read it, except as the weight of a site."""
    readers: dict[int, set[str]] = defaultdict(set)
    for node in root.graph.nodes:
        if node.op == "call_module" and not isinstance(verdicts[node], GraphSite):
            for tensor in root.get_submodule(str(node.target)).parameters():
                readers[id(tensor)].add(node.name)
        elif node.op == "get_attr":
            users = list(users_of(node))
            sites = [user for user in users if isinstance(verdicts[user], GraphSite) and _is_weight_of(user, node)]
            others = {user.name for user in users if user not in sites}
            if others:
                readers[id(get_tensor(root, str(node.target)))].update(others)
    return readers


def _is_weight_of(user: fx.Node, node: fx.Node) -> bool:
    call = conv_call(user)
    return call is not None and call.weight is node and call.input is not node and call.bias is not node


def _merge_calls(path: str, nodes: list[fx.Node], verdicts: Mapping[fx.Node, GraphSite | Skip]) -> GraphSite | Skip:
    """Merge all calls of one convolution into one site, or a Skip if they use the weight with different settings."""
    calls = [verdict for node in nodes if isinstance(verdict := verdicts[node], GraphSite)]
    first = calls[0]
    if any(site.spec != first.spec or site.attributes != first.attributes for site in calls):
        return Skip("its weight is used by calls with different settings", path)
    return replace(first, nodes=tuple(nodes), input_shapes=_input_shapes(nodes))


def _is_foreign_conv(module: nn.Module) -> bool:
    """Return whether a leaf module is another kind of convolution, such as a scripted or quantized one."""
    name = str(module.original_name) if isinstance(module, torch.jit.ScriptModule) else type(module).__name__
    return ("Conv" in name or name == "Linear") and not list(module.children())


def _holds_node(value: object) -> bool:
    return isinstance(value, fx.Node) or (isinstance(value, list | tuple) and any(map(_holds_node, value)))
