"""The only writer of graphs: puts the stages of a chain where a convolution was."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn
from torch.fx.traceback import NodeSource, NodeSourceAction

from fxfact.graph.base import GraphSite, conv_input, held_by_called_module

_STALE = ("val", "tensor_meta", "example_value", "unbacked_bindings", "type")


def splice(graph_module: fx.GraphModule, site: GraphSite, stages: Sequence[nn.Module], *, pass_name: str) -> None:
    """Call ``stages`` (in order, installed as ``<path>.0``, ``<path>.1``, …) wherever ``site`` was called.

    All calls share the stages. The new nodes have the old one's meta but for shapes, and say what they came from; the
    old module, or the attributes that nothing else reads, are removed. The caller recompiles.
    """
    _install(graph_module, site, stages)
    for node in site.nodes:
        value = conv_input(node)
        with graph_module.graph.inserting_before(node):
            for index in range(len(stages)):
                value = graph_module.graph.call_module(f"{site.path}.{index}", (value,))
                value.meta = {key: item for key, item in node.meta.items() if key not in _STALE}
                action = [NodeSourceAction.REPLACE, NodeSourceAction.CREATE]
                value.meta["from_node"] = [NodeSource(node, pass_name, action)]
        node.replace_all_uses_with(value)
        read = [source for source in node.all_input_nodes if source.op == "get_attr"]
        graph_module.graph.erase_node(node)
        for source in read:
            if not source.users:
                graph_module.graph.erase_node(source)


def _install(root: fx.GraphModule, site: GraphSite, stages: Sequence[nn.Module]) -> None:
    owner, _, _ = (site.attributes[0] if site.attributes else site.path + ".").rpartition(".")
    for stage in stages:
        stage.train(root.get_submodule(owner).training)
    for target in site.attributes:
        readers = [node for node in root.graph.nodes if node.op == "get_attr" and node.target == target]
        alone = all(user in site.nodes for node in readers for user in node.users)
        if alone and not held_by_called_module(root, target):
            module_path, _, tensor_name = target.rpartition(".")
            delattr(root.get_submodule(module_path), tensor_name)
    if site.attributes and site.path != site.attributes[0]:
        for index, stage in enumerate(stages):
            root.get_submodule(site.path).add_module(str(index), stage)
        return
    parent, _, child = site.path.rpartition(".")
    root.get_submodule(parent).add_module(child, nn.Sequential(*stages).train(stages[0].training))
