"""Neighbours in a graph made one: a batch norm behind a convolution, a pointwise convolution behind another."""

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
    """Make batch norms in evaluation mode part of the convolutions before them, where nothing else reads these or
    their weights; how many. It is for private copies; the caller recompiles.

    W' = s W and b' = s (b − mean) + shift, where s = scale / √(variance + eps).
    """
    pairs = list(_norms_behind_convs(graph_module))
    for conv, norm in pairs:
        module: Any = copy_structure(graph_module.get_submodule(str(conv.target)))
        grad = module.weight.requires_grad
        weight, bias = _normed(module, graph_module.get_submodule(str(norm.target)))
        module.weight, module.bias = nn.Parameter(weight, requires_grad=grad), nn.Parameter(bias, requires_grad=grad)
        _put(graph_module, str(conv.target), module)
        norm.replace_all_uses_with(conv)
        graph_module.graph.erase_node(norm)
    graph_module.delete_all_unused_submodules()
    return len(pairs)


def merge_pointwise(graph_module: fx.GraphModule) -> int:
    """Make a 1×1 convolution behind another, with nothing between, one of both, where that is not dearer; how many. It
    is for private copies; the caller recompiles.

    W = W₂ W₁ and b = W₂ b₁ + b₂.
    """
    merged = 0
    while pair := next(_pointwise_behind_pointwise(graph_module), None):
        one, other = pair
        first, second = (_layer(graph_module, node) for node in pair)
        assert first is not None
        assert second is not None
        (module,) = write_conv(*_product(first, second))
        module.train(graph_module.get_submodule(str(other.target)).training)
        _put(graph_module, str(other.target), module)
        other.replace_input_with(one, one.all_input_nodes[0])
        graph_module.graph.erase_node(one)
        merged += 1
    graph_module.delete_all_unused_submodules()
    return merged


def _norms_behind_convs(graph_module: fx.GraphModule) -> Iterator[_Pair]:
    uses = _uses(graph_module)
    for norm in graph_module.graph.nodes:
        module: Any = _module(graph_module, norm)
        if type(module) not in _NORMS or "forward" in vars(module) or has_hooks(module):
            continue
        if module.training or module.running_mean is None or len(norm.args) != 1 or norm.kwargs:
            continue
        (conv,) = norm.all_input_nodes
        layer, alone = _layer(graph_module, conv), uses[conv.target] == 1 and list(conv.users) == [norm]
        if layer is not None and alone and _is_over_channels(module, layer.spec, conv):
            yield conv, norm


def _is_over_channels(norm: Any, spec: ConvSpec, conv: fx.Node) -> bool:
    """Whether what the norm takes for channels are the convolution's, as they are unless its map is unbatched."""
    shape = shape_of(conv)
    batched = shape is None or len(shape) == spec.order + 2
    return batched and type(norm) is _NORMS[spec.order - 1] and norm.num_features == spec.out_channels


def _pointwise_behind_pointwise(graph_module: fx.GraphModule) -> Iterator[_Pair]:
    uses = _uses(graph_module)
    for other in graph_module.graph.nodes:
        second = _layer(graph_module, other)
        if second is None or not _is_plain(second.spec):
            continue
        (one,) = other.all_input_nodes
        first = _layer(graph_module, one)
        if first is None or not _is_plain(first.spec) or list(one.users) != [other]:
            continue
        if first.spec.order != second.spec.order or first.spec.out_channels != second.spec.in_channels:
            continue  # an unbatched map of the one is a batch of the other
        spec = _product(first, second)[0]
        if uses[one.target] == uses[other.target] == 1 and spec.params <= first.spec.params + second.spec.params:
            yield one, other


def _product(first: ConvLayer, second: ConvLayer) -> tuple[ConvSpec, Tensor, Tensor | None]:
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


def _normed(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight, in PyTorch's layout, and bias."""
    layer = read_conv(conv)
    assert isinstance(layer, ConvLayer)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.double()
    shift = 0.0 if norm.bias is None else norm.bias.detach().double()
    weight = layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    moved = (bias - norm.running_mean) * scale + shift
    return to_torch(layer.spec, weight).to(conv.weight), moved.to(conv.weight)


def _layer(graph_module: fx.GraphModule, node: fx.Node) -> ConvLayer | None:
    """Of a node that calls a convolution module and nothing else."""
    module = _module(graph_module, node)
    called_alone = len(node.all_input_nodes) == len(node.args) + len(node.kwargs) == 1
    if module is None or not is_conv(module) or not called_alone:
        return None
    layer = read_conv(module)
    return layer if isinstance(layer, ConvLayer) else None


def _module(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _uses(graph_module: fx.GraphModule) -> Counter[object]:
    """How often every module is called, or a tensor of it read, under whatever name."""
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    calls = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]
    reads = [str(node.target).rpartition(".")[0] for node in graph_module.graph.nodes if node.op == "get_attr"]
    by_module = Counter(id(modules[path]) for path in (*calls, *reads) if path in modules)
    return Counter({path: by_module[id(modules[path])] for path in calls})


def _put(graph_module: fx.GraphModule, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(graph_module.get_submodule(owner), name, module)
