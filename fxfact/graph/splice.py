"""Puts the stages of a chain in place of a convolution in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.fx.traceback import NodeSource, NodeSourceAction

from fxfact.conv import is_conv, spec_of
from fxfact.graph.base import GraphSite, conv_input, is_in_called_module

_STALE = ("val", "tensor_meta", "example_value", "unbacked_bindings", "type")


def splice(
    graph_module: fx.GraphModule, site: GraphSite, stages: Sequence[nn.Module], *, pass_name: str
) -> tuple[GraphSite, ...]:
    """Replace a convolution by a chain of modules, at every call.

    All calls share the stages. The new nodes get the meta of the old node, without shapes, and record in ``from_node``
    which node they replace. The old module is removed. Tensors of a functional call are removed if no other node reads
    them. Recompile the graph module afterwards.

    Args:
        graph_module: the graph module to rewrite.
        site: the convolution to replace.
        stages: the modules of the chain, in order. They are installed as ``<path>.0``, ``<path>.1``, …
        pass_name: the name that ``from_node`` records.

    Returns:
        The convolutions among the stages.
    """
    _install(graph_module, site, stages)
    calls: list[list[fx.Node]] = [[] for _ in stages]
    for node in site.nodes:
        value = conv_input(node)
        with graph_module.graph.inserting_before(node):
            for index in range(len(stages)):
                value = graph_module.graph.call_module(f"{site.path}.{index}", (value,))
                value.meta = {key: item for key, item in node.meta.items() if key not in _STALE}
                action = [NodeSourceAction.REPLACE, NodeSourceAction.CREATE]
                value.meta["from_node"] = [NodeSource(node, pass_name, action)]
                calls[index].append(value)
        node.replace_all_uses_with(value)
        read = [source for source in node.all_input_nodes if source.op == "get_attr"]
        graph_module.graph.erase_node(node)
        for source in read:
            if not source.users:
                graph_module.graph.erase_node(source)
    paths = [f"{site.path}.{index}" for index in range(len(stages))]
    return tuple(_stage_site(*stage) for stage in zip(paths, stages, calls, strict=True) if is_conv(stage[1]))


def _stage_site(path: str, stage: Any, calls: Sequence[fx.Node]) -> GraphSite:
    return GraphSite(path=path, spec=spec_of(stage), weight=stage.weight, bias=stage.bias, nodes=tuple(calls))


def _install(root: fx.GraphModule, site: GraphSite, stages: Sequence[nn.Module]) -> None:
    """Add the stages to the module tree and remove the tensors and the module that they replace."""
    owner, _, _ = (site.attributes[0] if site.attributes else site.path + ".").rpartition(".")
    for stage in stages:
        stage.train(root.get_submodule(owner).training)
    for target in site.attributes:
        readers = [node for node in root.graph.nodes if node.op == "get_attr" and node.target == target]
        only_here = all(user in site.nodes for node in readers for user in node.users)
        if only_here and not is_in_called_module(root, target):
            module_path, _, tensor_name = target.rpartition(".")
            delattr(root.get_submodule(module_path), tensor_name)
    if site.attributes and site.path != site.attributes[0]:
        for index, stage in enumerate(stages):
            root.get_submodule(site.path).add_module(str(index), stage)
        return
    parent, _, child = site.path.rpartition(".")
    root.get_submodule(parent).add_module(child, nn.Sequential(*stages).train(stages[0].training))
