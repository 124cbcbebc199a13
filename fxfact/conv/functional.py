"""Convolutions as functions: reads calls of ``torch.conv2d`` and its relatives, and of their ATen operators."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxfact.conv.kernels import onednn_conv3d
from fxfact.conv.spec import ConvSpec

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ANY = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
_aten = torch.ops.aten
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _CONV),
    **dict.fromkeys((_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default), _CONV),
    **dict.fromkeys((_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding), _CONV),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _TRANSPOSE),
    **dict.fromkeys(
        (_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input), _TRANSPOSE
    ),
    **dict.fromkeys((torch.convolution, _aten.convolution.default), _ANY),
    onednn_conv3d: _CONV,
}
_CONV_NAME = re.compile(r"conv(olution|_?transpose|_tbc|_depthwise|\dd)")
_CONV_BACKWARD_NAME = re.compile(r"conv\w*_backward(\.|$)")


@dataclass(frozen=True)
class ConvCall:
    """The arguments of a functional convolution.

    Attributes:
        input: The input: a tensor, or the node of a graph.
        weight: The weight: a tensor, or the node of a graph.
        bias: The bias: a tensor, the node of a graph, or None.
        settings: The other arguments of the call, with the names that ``ConvSpec.parse`` uses.
        transposed: Whether the convolution is transposed.
    """

    input: Any
    weight: Any
    bias: Any
    settings: Mapping[str, Any]
    transposed: bool

    def spec_for(self, weight_shape: Sequence[int], *, bias: bool) -> ConvSpec:
        """Return the spec for a weight of this shape, in PyTorch's layout. Raises SpecError."""
        first, second, *kernel = weight_shape
        groups = self.settings.get("groups", 1)
        into, out = (first, second * groups) if self.transposed else (second * groups, first)
        return ConvSpec.parse(into, out, tuple(kernel), bias=bias, transposed=self.transposed, **self.settings)


def read_call(function: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ConvCall | None:
    """Return the arguments of a call of a convolution, or None if the function is not a convolution."""
    names = _ARGUMENTS.get(function)
    if names is None:
        return None
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    input, weight, bias = (given.pop(name, None) for name in ("input", "weight", "bias"))
    transposed = bool(given.pop("transposed", names is _TRANSPOSE))
    return ConvCall(input, weight, bias, given, transposed)


def write_call(module: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the function that an ``nn.Conv`` module calls, and its arguments after input, weight and bias.

    The module must pad with zeros.
    """
    names = _TRANSPOSE if module.transposed else _CONV
    functions = [function for function, arguments in _ARGUMENTS.items() if arguments is names]
    return functions[len(module.kernel_size) - 1], tuple(getattr(module, name) for name in names[3:])


def looks_like_conv(function: object) -> bool:
    """Whether the name of a function is that of a convolution."""
    return bool(_CONV_NAME.search(getattr(function, "__name__", ""))) and not differentiates_conv(function)


def differentiates_conv(function: object) -> bool:
    """Whether autograd calls this function for a convolution. Then it reads the weight as the convolution does."""
    return bool(_CONV_BACKWARD_NAME.search(getattr(function, "__name__", "")))
