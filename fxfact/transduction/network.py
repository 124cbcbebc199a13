"""Rewrites the graph of a network for images as one for videos, and compares both on a still clip."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from fxfact.conv import is_conv
from fxfact.errors import ArgumentTypeError, CaptureError, VerificationError, check_int
from fxfact.graph import record_shapes
from fxfact.nn import FactorizedConv, SharedConv
from fxfact.transduction.calls import change_call
from fxfact.transduction.modules import TimeKernel, module_3d
from fxfact.utils import relative_error, to_eval, tolerance_for


def transduct(
    model: nn.Module, example_inputs: Tensor, *, kernel_size: int = 3, train_all: bool = True
) -> fx.GraphModule:
    """Return a network for videos made of one for images, which at first maps every frame as the model does.

    Every convolution whose kernel is longer than 1 along the height gets an axis of frames, of which it at first only
    sees the center. Norms, pools, activations, indices and the like get one along which they do nothing. A mean or an
    adaptive pool to one value is over the frames as well, so that a classifier returns its classes for a clip
    (Kossaifi et al. 2020, who call this transduction).

    Args:
        model: the network, with one input: maps (batch, channels, height, width). It is not changed.
        example_inputs: a batch of images, with which both networks are compared on a still clip.
        kernel_size: the size of the new kernels along the frames.
        train_all: whether convolutions are trained as a whole. If not, only the stages of factorized layers of
            ``fxfact.nn`` that see other frames are, beside norms and linear layers.

    Returns:
        The network, whose input is (batch, channels, frames, height, width). It shares no tensor with the model.

    Raises:
        ArgumentTypeError, ArgumentError: if an argument is invalid.
        CaptureError: if torch.fx cannot trace the model, or something in it has no counterpart with frames. The message
            names it.
        VerificationError: if the network does not map the frames of a still clip as the model does.
    """
    if not isinstance(example_inputs, Tensor) or example_inputs.ndim != 4:
        found = tuple(example_inputs.shape) if isinstance(example_inputs, Tensor) else type(example_inputs).__name__
        raise ArgumentTypeError(
            f"example_inputs must be a batch of images (batch, channels, height, width), got {found}"
        )
    time = TimeKernel(check_int("kernel_size", kernel_size, 1), train_all)
    video = _traced(model)
    record_shapes(video, [example_inputs])
    problems = _rewrite(video, time)
    if problems:
        raise CaptureError(
            f"these have no counterpart with frames: {'; '.join(problems)}. Replace them (a SharedConv by its "
            "to_conv()), or add the axis by hand: fxfact.nn.FactorizedConv.transduct and fxfact.nn.transduct_conv do "
            "it for single layers."
        )
    video.graph.lint()
    video.recompile()
    _verify(model, video, example_inputs, frames=kernel_size + 1)
    return video


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        return isinstance(m, FactorizedConv | SharedConv) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> fx.GraphModule:
    own = copy.deepcopy(model)
    try:
        graph = _Tracer().trace(own)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise CaptureError(f"torch.fx cannot trace {type(model).__name__}: {reason}") from error
    return fx.GraphModule(own, graph, type(model).__name__).train(model.training)


def _rewrite(video: fx.GraphModule, time: TimeKernel) -> list[str]:
    """Rewrite the nodes whose inputs are maps, and return what cannot be rewritten."""
    problems, done = [], dict[str, nn.Module | None]()
    sizes = {node for node in video.graph.nodes if _is_size(node)}
    for node in video.graph.nodes:
        if node in sizes and node.target is getattr:
            continue
        inputs = node.all_input_nodes
        if node.op == "get_attr" or not any(_is_map(one) or one in sizes for one in inputs):
            continue
        if node.op == "call_module":
            module = done[node.target] if node.target in done else module_3d(video.get_submodule(node.target), time)
            done[node.target] = module
            if module is None:
                problems.append(f"{node.target} ({type(video.get_submodule(node.target)).__name__})")
        elif node.op in ("call_function", "call_method") and not _change(node, sizes):
            problems.append(f"{node.name} (a call of {_name(node)})")
    weights: dict[int, nn.Parameter] = {}
    for path, module in done.items():
        if module is not None:
            _share_weight(video.get_submodule(path), module, weights)
            video.set_submodule(path, module)
    return list(dict.fromkeys(problems))


def _share_weight(old: nn.Module, new: nn.Module, weights: dict[int, nn.Parameter]) -> None:
    """Let convolutions that held one weight hold one again. ``weights`` has the new ones by the ``id`` of the old."""
    convs: list[Any] = [module for module in new.modules() if is_conv(module)]
    weight = old._parameters.get("weight")
    if weight is not None and len(convs) == 1:
        kept = weights.setdefault(id(weight), convs[0].weight)
        convs[0].weight = kept if kept.shape == convs[0].weight.shape else convs[0].weight


def _change(node: fx.Node, sizes: set[fx.Node]) -> bool:
    if node.args and node.args[0] in sizes and _name(node) == "getitem":  # one of the sizes of a map
        axis: Any = node.args[1]
        node.update_arg(1, axis + 1 if isinstance(axis, int) and axis >= 2 else axis)
        return isinstance(axis, int)
    if any(one.op == "get_attr" and _ndim(one) > 1 for one in node.all_input_nodes):
        return False  # a parameter whose axes would meet others
    return change_call(node, _name(node))


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _ndim(node: fx.Node) -> int:
    shape: Any = getattr(node.meta.get("tensor_meta"), "shape", ())
    return len(shape)


def _is_map(node: fx.Node) -> bool:
    return _ndim(node) == 4


def _is_size(node: fx.Node) -> bool:
    """Whether a node is the shape of a map."""
    is_shape = node.target is getattr and len(node.args) > 1 and node.args[1] == "shape"
    is_size = node.op == "call_method" and node.target == "size" and len(node.args) == 1
    return (is_shape or is_size) and isinstance(node.args[0], fx.Node) and _is_map(node.args[0])


def _verify(model: nn.Module, video: fx.GraphModule, images: Tensor, frames: int) -> None:
    """Compare both networks on a still clip. Raises VerificationError."""
    modes = [(network, network.training) for network in (model, video)]
    clip = images.unsqueeze(2).expand(-1, -1, frames, -1, -1)
    with torch.no_grad():
        try:
            expected, found = to_eval(model)(images), to_eval(video)(clip)
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise VerificationError(
                f"the network for videos does not run on a clip of {frames} frames: {reason}"
            ) from error
        finally:
            for network, training in modes:
                network.train(training)
    still = tree_map(lambda t: _repeated(t, frames) if isinstance(t, Tensor) else t, expected)
    distance = relative_error(still, found)
    if not distance <= tolerance_for(expected):
        raise VerificationError(
            f"the network for videos does not map the frames of a still clip as {type(model).__name__} does (relative "
            f"error {distance:.1e}). Something in its forward depends on the number of axes. Replace it by a module."
        )


def _repeated(output: Tensor, frames: int) -> Tensor:
    """Return the output for a still clip: maps are repeated for every frame."""
    return output.unsqueeze(2).expand(-1, -1, frames, -1, -1) if output.ndim == 4 else output
