"""How convolutions are spelled as functions: one entry for every function that is understood."""

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
_LOOKS_LIKE_ONE = re.compile(r"conv(olution|_?transpose|_tbc|_depthwise|\dd)")
_DIFFERENTIATES_ONE = re.compile(r"conv\w*_backward(\.|$)")


@dataclass(frozen=True)
class ConvCall:
    """The arguments of a functional convolution: tensors, or what stands for them in a graph, and ``settings`` as
    ``ConvSpec.parse`` names them, those left at their defaults missing.
    """

    input: Any
    weight: Any
    bias: Any
    settings: Mapping[str, Any]
    transposed: bool

    def spec_for(self, weight_shape: Sequence[int], *, bias: bool) -> ConvSpec:
        """What the call computes with a weight of this shape, in PyTorch's layout. Raises SpecError."""
        first, second, *kernel = weight_shape
        groups = self.settings.get("groups", 1)
        into, out = (first, second * groups) if self.transposed else (second * groups, first)
        return ConvSpec.parse(into, out, tuple(kernel), bias=bias, transposed=self.transposed, **self.settings)


def read_call(function: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ConvCall | None:
    """The arguments of a call of a convolution; None where the function is another one."""
    names = _ARGUMENTS.get(function)
    if names is None:
        return None
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    source, weight, bias = (given.pop(name, None) for name in ("input", "weight", "bias"))
    transposed = bool(given.pop("transposed", names is _TRANSPOSE))
    return ConvCall(source, weight, bias, given, transposed)


def write_call(module: Any) -> tuple[Any, tuple[Any, ...]]:
    """The function that an ``nn.Conv`` without a padding mode is, and its arguments behind input, weight and bias."""
    names = _TRANSPOSE if module.transposed else _CONV
    functions = [function for function, known in _ARGUMENTS.items() if known is names]
    return functions[len(module.kernel_size) - 1], tuple(getattr(module, name) for name in names[3:])


def looks_like_conv(function: object) -> bool:
    """Whether the name of a function says that it convolves."""
    return bool(_LOOKS_LIKE_ONE.search(getattr(function, "__name__", ""))) and not differentiates_conv(function)


def differentiates_conv(function: object) -> bool:
    """Whether it is what autograd calls for a convolution, whose weight it reads as that does."""
    return bool(_DIFFERENTIATES_ONE.search(getattr(function, "__name__", "")))
