"""The counterparts, for maps with frames, of functions and methods on maps (batch, channels, height, width)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import fx

from fxfact.transduction.modules import upsampling_mode, with_frames

_UNCHANGED = {
    name
    for names in (
        "add add_ iadd sub sub_ isub mul mul_ imul div div_ true_divide truediv itruediv neg abs exp sqrt square pow",
        "clamp clamp_ maximum minimum relu relu_ relu6 leaky_relu elu gelu silu mish sigmoid sigmoid_ tanh tanh_",
        "hardtanh hardswish hardsigmoid softplus dropout batch_norm group_norm",
        "contiguous clone detach to float double half type type_as",
        "flatten view reshape",  # the still clip shows whether they mean the same
    )
    for name in names.split()
}
_MEANS = {"mean", "amax", "amin"}


def change_call(node: fx.Node, name: str) -> bool:
    """Rewrite a call on maps for maps with frames, and return whether it could."""
    if name in _UNCHANGED:
        return True
    change = _CHANGES.get(name)
    return False if change is None else change(node)


def with_axis(axis: int) -> int:
    """Return the number of an axis of maps, for maps with frames."""
    return axis + 1 if axis >= 2 else axis - 1 if axis < -2 else axis


def _change_dim(node: fx.Node, place: int, name: str) -> bool:
    """Change the number of an axis among the arguments of a call."""
    if len(node.args) > place and isinstance(node.args[place], int):
        node.update_arg(place, with_axis(node.args[place]))  # type: ignore[arg-type]
    elif isinstance(node.kwargs.get(name), int):
        node.update_kwarg(name, with_axis(node.kwargs[name]))  # type: ignore[arg-type]
    return True


def _change_mean(node: fx.Node) -> bool:
    """Change the axes of a mean or an extremum. One over height and width is one over the frames as well."""
    dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if dims is None:
        return True
    axes = [with_axis(axis) for axis in ([dims] if isinstance(dims, int) else dims)]
    if {axis % 5 for axis in axes} >= {3, 4}:
        axes.append(2)
    if len(node.args) > 1:
        node.update_arg(1, tuple(axes))
    else:
        node.update_kwarg("dim", tuple(axes))
    return True


def _change_index(node: fx.Node) -> bool:
    """Insert a full slice for the frames into an index of more than two entries."""
    index: Any = node.args[1]
    entries = index if isinstance(index, tuple) else (index,)
    if any(entry is None or entry is Ellipsis or isinstance(entry, fx.Node | list) for entry in entries):
        return False
    if len(entries) > 2:
        node.update_arg(1, (*entries[:2], slice(None), *entries[2:]))
    return True


def _change_pad(node: fx.Node) -> bool:
    amounts: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    if not isinstance(amounts, tuple | list) or any(isinstance(amount, fx.Node) for amount in amounts):
        return False
    if mode != "constant":
        amounts = (*amounts, 0, 0)
    elif len(amounts) > 4:
        amounts = (*amounts[:4], 0, 0, *amounts[4:])
    if len(node.args) > 1:
        node.update_arg(1, tuple(amounts))
    else:
        node.update_kwarg("pad", tuple(amounts))
    return True


def _pool(function: Callable[..., Any], names: tuple[tuple[str, Any], ...]) -> Callable[[fx.Node], bool]:
    """Return a change to the 3-D function, whose settings of these names get a neutral value for the frames."""

    def change(node: fx.Node) -> bool:
        given = dict(zip([name for name, _ in names], node.args[1:], strict=False))
        settings: dict[str, Any] = {**given, **{k: v for k, v in node.kwargs.items() if k != "input"}}
        if settings.pop("return_indices", False) or len(node.args) > 1 + len(names):
            return False
        for name, neutral in names:
            if neutral is not None and settings.get(name) is not None and settings[name] != []:
                settings[name] = with_frames(settings[name], neutral)
        node.op, node.target = "call_function", function
        node.args, node.kwargs = ((node.args[0],) if node.args else (node.kwargs["input"],)), settings
        return True

    return change


def _change_interpolate(node: fx.Node) -> bool:
    names = ("size", "scale_factor", "mode", "align_corners")
    settings: dict[str, Any] = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    mode = upsampling_mode(settings.get("mode", "nearest"))
    scale = settings.get("scale_factor")
    if mode is None or scale is None or isinstance(scale, fx.Node):
        return False
    node.args = node.args[:1]
    node.kwargs = {**settings, "mode": mode, "scale_factor": with_frames(scale, 1.0)}
    return True


_MAX = (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1), ("ceil_mode", None))
_AVG = (
    ("kernel_size", 1),
    ("stride", 1),
    ("padding", 0),
    ("ceil_mode", None),
    ("count_include_pad", None),
    ("divisor_override", None),
)
_CHANGES: dict[str, Callable[[fx.Node], bool]] = {
    **dict.fromkeys(_MEANS, _change_mean),
    "getitem": _change_index,
    "pad": _change_pad,
    "cat": lambda node: _change_dim(node, 1, "dim"),
    "chunk": lambda node: _change_dim(node, 2, "dim"),
    "split": lambda node: _change_dim(node, 2, "dim"),
    "softmax": lambda node: _change_dim(node, 1, "dim"),
    "size": lambda node: _change_dim(node, 1, "dim"),
    "max_pool2d": _pool(F.max_pool3d, _MAX),
    "avg_pool2d": _pool(F.avg_pool3d, _AVG),
    "adaptive_avg_pool2d": _pool(F.adaptive_avg_pool3d, (("output_size", 1),)),
    "adaptive_max_pool2d": _pool(F.adaptive_max_pool3d, (("output_size", 1),)),
    "interpolate": _change_interpolate,
}
