"""Puts the stages of a chain in place of a convolution in a graph."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.fx.traceback import NodeSource, NodeSourceAction

from fxfact.conv import TRANSPOSED_TYPES, decides_size, is_conv, spec_of
from fxfact.graph.base import GraphSite, conv_input, erase_unread, is_in_called_module, output_size_of, users_of

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
        value, output_size = conv_input(node), output_size_of(node)
        with graph_module.graph.inserting_before(node):
            for index in range(len(stages)):
                target = f"{site.path}.{index}"
                value = graph_module.graph.call_module(target, _arguments(stages[index], value, output_size))
                value.meta = {key: item for key, item in node.meta.items() if key not in _STALE}
                action = [NodeSourceAction.REPLACE, NodeSourceAction.CREATE]
                value.meta["from_node"] = [NodeSource(node, pass_name, action)]
                calls[index].append(value)
        node.replace_all_uses_with(value)
        read = node.all_input_nodes
        graph_module.graph.erase_node(node)
        for source in read:
            erase_unread(source)
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
        only_here = all(user in site.nodes for node in readers for user in users_of(node))
        if only_here and not is_in_called_module(root, target):
            module_path, _, tensor_name = target.rpartition(".")
            delattr(root.get_submodule(module_path), tensor_name)
    if site.attributes and site.path != site.attributes[0]:
        for index, stage in enumerate(stages):
            root.get_submodule(site.path).add_module(str(index), stage)
        return
    parent, _, child = site.path.rpartition(".")
    old = nn.Module() if site.attributes else root.get_submodule(site.path)
    root.get_submodule(parent).add_module(child, _holder(old, stages))


def _holder(old: nn.Module, stages: Sequence[nn.Module]) -> nn.Module:
    """Return a module with the stages, and with the modules and tensors of the old one that are not the convolution's.

    It can only be called if there are no such modules.
    """
    children = [(name, child) for name, child in old._modules.items() if child is not None]
    holder = nn.Module() if children else nn.Sequential()
    for name, child in [*children, *((str(index), stage) for index, stage in enumerate(stages))]:
        holder.add_module(name, child)
    own = {name: tensor for name, tensor in old._parameters.items() if name not in ("weight", "bias")}
    for name, parameter in own.items():
        holder.register_parameter(name, parameter)
    for name, buffer in old._buffers.items():
        holder.register_buffer(name, buffer, persistent=name not in old._non_persistent_buffers_set)
    holder.training = stages[0].training
    return holder


def _arguments(stage: nn.Module, input: fx.Node, output_size: Any) -> tuple[Any, ...]:
    """Return the arguments with which a stage computes its part of an output of this size, as ``call_stage`` does."""
    if output_size is None or not isinstance(stage, TRANSPOSED_TYPES):
        return (input,)
    graph, decides = input.graph, decides_size(stage)
    sizes: list[Any] = []
    for axis, own in enumerate(decides, start=-len(decides)):
        if not own:
            sizes.append(graph.call_method("size", (input, axis)))
        elif isinstance(output_size, fx.Node):
            sizes.append(graph.call_function(operator.getitem, (output_size, axis)))
        else:
            sizes.append(output_size[axis])
    return (input, sizes)
