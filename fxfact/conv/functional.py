"""Convolutions as functions: reads calls of ``torch.conv2d`` and its relatives, and of their ATen operators.

A linear layer is a call of ``linear``, or a matrix product with a weight: ``x @ weight`` or ``addmm(bias, x, weight)``,
where the weight is held as (in, out).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fxfact.conv.kernels import onednn_conv3d
from fxfact.conv.spec import ConvSpec
from fxfact.errors import SpecError

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ANY = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
_LINEAR = ("input", "weight", "bias")
_ADDMM = ("bias", "input", "weight")
_aten = torch.ops.aten
_TENSOR: Any = Tensor
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
    **dict.fromkeys((functional.linear, _aten.linear.default), _LINEAR),
}
_PRODUCTS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((torch.addmm, _TENSOR.addmm, _aten.addmm.default), _ADDMM),
    **dict.fromkeys((torch.mm, _TENSOR.mm, _aten.mm.default), ("input", "weight")),
    **dict.fromkeys((torch.matmul, _TENSOR.matmul, _TENSOR.__matmul__, _aten.matmul.default), ("input", "weight")),
    **dict.fromkeys((torch.bmm, _TENSOR.bmm, _aten.bmm.default), ("input", "weight")),
    operator.matmul: ("input", "weight"),
}
_PRODUCT_NAMES = {"self": "input", "mat1": "input", "mat2": "weight", "other": "weight"}  # of PyTorch's arguments
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
        is_linear: Whether it is a linear layer.
        is_product: Whether the call is a matrix product, which is only a linear layer if its second factor is a
            parameter, or one that is repeated for every matrix of a batch.
    """

    input: Any
    weight: Any
    bias: Any
    settings: Mapping[str, Any]
    transposed: bool
    is_linear: bool = False
    is_product: bool = False

    def spec_for(self, weight_shape: Sequence[int], *, bias: bool) -> ConvSpec:
        """Return the spec for a weight of this shape, in PyTorch's layout. Raises SpecError."""
        if self.is_linear and len(weight_shape) != 2:
            raise SpecError(f"the weight of a linear layer is a matrix, got {tuple(weight_shape)}")
        first, second, *kernel = weight_shape
        groups = self.settings.get("groups", 1)
        into, out = (first, second * groups) if self.transposed else (second * groups, first)
        return ConvSpec.parse(into, out, tuple(kernel), bias=bias, transposed=self.transposed, **self.settings)


def read_call(function: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ConvCall | None:
    """Return the arguments of a call of a convolution, or None if the function is not a convolution."""
    names = _ARGUMENTS.get(function)
    if names is None:
        return _read_product(_PRODUCTS.get(function, ()), args, kwargs)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    input, weight, bias = (given.pop(name, None) for name in ("input", "weight", "bias"))
    transposed = bool(given.pop("transposed", names is _TRANSPOSE))
    return ConvCall(input, weight, bias, given, transposed, is_linear=names is _LINEAR)


def _read_product(names: tuple[str, ...], args: Sequence[Any], kwargs: Mapping[str, Any]) -> ConvCall | None:
    """Return the arguments of a matrix product, or None for any other function, and for scaled products."""
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        known = "bias" if name == "self" and names is _ADDMM else _PRODUCT_NAMES.get(name, name)
        given["bias" if name == "input" and names is _ADDMM else known] = value
    if given.pop("beta", 1) != 1 or given.pop("alpha", 1) != 1 or given.keys() != {*names} or not names:
        return None
    bias = given.get("bias")
    return ConvCall(given["input"], given["weight"], bias, {}, transposed=True, is_linear=True, is_product=True)


def matrix_of(weight: object) -> Tensor | None:
    """Return the matrix that a weight is, or repeats for every matrix of a batch. Return None if it is neither."""
    if not isinstance(weight, Tensor):
        return None
    is_repeated = weight.ndim == 3 and len(weight) > 0 and weight.stride(0) == 0
    return weight[0] if is_repeated else weight if weight.ndim == 2 else None


def write_call(module: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the function that a convolution module calls, and its arguments after input, weight and bias.

    The module must pad with zeros.
    """
    if isinstance(module, nn.Linear):
        return functional.linear, ()
    names = _TRANSPOSE if module.transposed else _CONV
    functions = [function for function, arguments in _ARGUMENTS.items() if arguments is names]
    return functions[len(module.kernel_size) - 1], tuple(getattr(module, name) for name in names[3:])


def looks_like_conv(function: object) -> bool:
    """Whether the name of a function is that of a convolution. What autograd calls for one is none."""
    name = getattr(function, "__name__", "")
    return bool(_CONV_NAME.search(name)) and not _CONV_BACKWARD_NAME.search(name)
