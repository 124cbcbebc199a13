"""Merges neighbors in a graph: a batch norm into the convolution before it, and two pointwise convolutions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfact.conv import ConvLayer, ConvSpec, has_hooks, is_conv, read_conv, to_torch, write_conv
from fxfact.graph.base import shape_of
from fxfact.utils import copy_structure

_Pair = tuple[fx.Node, fx.Node]
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norms(graph_module: fx.GraphModule) -> int:
    """Fold batch norms in evaluation mode into the convolutions before them, in place.

    The new weight is W' = s W and the new bias b' = s (b − mean) + shift, with s = scale / √(variance + eps). A batch
    norm stays if another node uses the output or the module of the convolution. A weight that other modules hold too
    stays as it is for them. Recompile the graph module afterwards.

    Args:
        graph_module: a private copy of the network.

    Returns:
        The number of batch norms folded.
    """
    pairs = list(_norms_after_convs(graph_module))
    for conv, norm in pairs:
        module: Any = copy_structure(graph_module.get_submodule(str(conv.target)))
        grad = module.weight.requires_grad
        weight, bias = _folded_weights(module, graph_module.get_submodule(str(norm.target)))
        module.weight, module.bias = nn.Parameter(weight, requires_grad=grad), nn.Parameter(bias, requires_grad=grad)
        _set_module(graph_module, str(conv.target), module)
        norm.replace_all_uses_with(conv)
        graph_module.graph.erase_node(norm)
    graph_module.delete_all_unused_submodules()
    return len(pairs)


def merge_pointwise(graph_module: fx.GraphModule) -> int:
    """Merge a 1×1 convolution with the 1×1 convolution that directly follows it, in place.

    The merged weight is W = W₂ W₁ and the merged bias b = W₂ b₁ + b₂. Two convolutions stay if the merged one would
    have more parameters. Recompile the graph module afterwards.

    Args:
        graph_module: a private copy of the network.

    Returns:
        The number of convolutions merged into another.
    """
    merged = 0
    while pair := next(_pointwise_after_pointwise(graph_module), None):
        one, other = pair
        first, second = (_conv_layer(graph_module, node) for node in pair)
        assert first is not None
        assert second is not None
        (module,) = write_conv(*_merged_conv(first, second))
        module.train(graph_module.get_submodule(str(other.target)).training)
        _set_module(graph_module, str(other.target), module)
        other.replace_input_with(one, one.all_input_nodes[0])
        graph_module.graph.erase_node(one)
        merged += 1
    graph_module.delete_all_unused_submodules()
    return merged


def _norms_after_convs(graph_module: fx.GraphModule) -> Iterator[_Pair]:
    uses = _count_uses(graph_module)
    for norm in graph_module.graph.nodes:
        module: Any = _called_module(graph_module, norm)
        if type(module) not in _NORMS or "forward" in vars(module) or has_hooks(module):
            continue
        if module.training or module.running_mean is None or len(norm.args) != 1 or norm.kwargs:
            continue
        (conv,) = norm.all_input_nodes
        layer, alone = _conv_layer(graph_module, conv), uses[conv.target] == 1 and list(conv.users) == [norm]
        if layer is not None and alone and _is_over_channels(module, layer.spec, conv):
            yield conv, norm


def _is_over_channels(norm: Any, spec: ConvSpec, conv: fx.Node) -> bool:
    """Return whether the norm's channels are those of the convolution.

    They are not if the input has no batch axis. After a linear layer they may be positions.
    """
    shape = shape_of(conv)
    if not spec.order:
        return False
    batched = shape is None or len(shape) == spec.order + 2
    return batched and type(norm) is _NORMS[spec.order - 1] and norm.num_features == spec.out_channels


def _pointwise_after_pointwise(graph_module: fx.GraphModule) -> Iterator[_Pair]:
    uses = _count_uses(graph_module)
    for other in graph_module.graph.nodes:
        second = _conv_layer(graph_module, other)
        if second is None or not _is_plain(second.spec):
            continue
        (one,) = other.all_input_nodes
        first = _conv_layer(graph_module, one)
        if first is None or not _is_plain(first.spec) or list(one.users) != [other]:
            continue
        if first.spec.order != second.spec.order or first.spec.out_channels != second.spec.in_channels:
            continue  # one would read the channel axis of the other as the batch axis
        spec = _merged_conv(first, second)[0]
        if uses[one.target] == uses[other.target] == 1 and spec.params <= first.spec.params + second.spec.params:
            yield one, other


def _merged_conv(first: ConvLayer, second: ConvLayer) -> tuple[ConvSpec, Tensor, Tensor | None]:
    one, other = first.spec, second.spec
    strides = tuple(a * b for a, b in zip(one.stride, other.stride, strict=True))
    spec = replace(other, in_channels=one.in_channels, stride=strides, bias=one.bias or other.bias)
    matrix = second.weight.flatten(1).double()
    weight = (matrix @ first.weight.flatten(1).double()).reshape(spec.weight_shape).to(first.weight)
    biases = [matrix @ first.bias.double()] if first.bias is not None else []
    biases += [second.bias.double()] if second.bias is not None else []
    return spec, weight, torch.stack(biases).sum(0).to(first.weight) if biases else None


def _is_plain(spec: ConvSpec) -> bool:
    pads = any(amount for pair in spec.padding for amount in pair)
    return set(spec.kernel_size) == {1} and not pads and spec.groups == 1 and not spec.transposed


def _folded_weights(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the weight, in PyTorch's layout, and the bias of a convolution with a batch norm folded into it."""
    layer = read_conv(conv)
    assert isinstance(layer, ConvLayer)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.double()
    shift = 0.0 if norm.bias is None else norm.bias.detach().double()
    weight = layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    moved = (bias - norm.running_mean) * scale + shift
    return to_torch(layer.spec, weight).to(conv.weight), moved.to(conv.weight)


def _conv_layer(graph_module: fx.GraphModule, node: fx.Node) -> ConvLayer | None:
    """Return the convolution that a node calls with one input, or None for any other node."""
    module = _called_module(graph_module, node)
    called_alone = len(node.all_input_nodes) == len(node.args) + len(node.kwargs) == 1
    if module is None or not is_conv(module) or not called_alone:
        return None
    layer = read_conv(module)
    return layer if isinstance(layer, ConvLayer) else None


def _called_module(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _count_uses(graph_module: fx.GraphModule) -> Counter[object]:
    """Count how often each module is called or its tensors are read, under any of its names."""
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    calls = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]
    reads = [str(node.target).rpartition(".")[0] for node in graph_module.graph.nodes if node.op == "get_attr"]
    by_module = Counter(id(modules[path]) for path in (*calls, *reads) if path in modules)
    return Counter({path: by_module[id(modules[path])] for path in calls})


def _set_module(graph_module: fx.GraphModule, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(graph_module.get_submodule(owner), name, module)
