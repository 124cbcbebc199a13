"""The description of a convolution without its weights (ConvSpec), and the cost of a chain of convolutions.

A linear layer is the convolution without spatial axes: order 0. Its channels are the last axis of a tensor, and every
other axis counts positions.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxfact.conv.cost import Cost
from fxfact.errors import SpecError

Sizes = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True, kw_only=True)
class ConvSpec:
    """The shapes and settings of a convolution, without its weights.

    Tuples have one entry per spatial axis. There are 1, 2 or 3 spatial axes, or none for a linear layer. ``parse``
    accepts the shorter forms that PyTorch accepts.

    Attributes:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        kernel_size: Kernel size per axis.
        stride: Stride per axis.
        padding: A pair ``(before, after)`` per axis, so that an int, a tuple and ``'same'`` have one representation.
        dilation: Dilation per axis.
        groups: Number of groups. It divides both numbers of channels.
        padding_mode: ``'zeros'``, ``'reflect'``, ``'replicate'`` or ``'circular'``.
        transposed: Whether this is a transposed convolution. A linear layer is transposed if its weight is held as
            ``(in, out)``, as in ``x @ weight``.
        output_padding: Additional output size per axis. Only transposed convolutions have it.
        bias: Whether the convolution has a bias.

    Raises:
        SpecError: If the values do not describe a convolution.
    """

    in_channels: int
    out_channels: int
    kernel_size: Sizes
    stride: Sizes
    padding: Padding
    dilation: Sizes
    groups: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: Sizes = ()
    bias: bool = False

    def __post_init__(self) -> None:
        order = len(self.kernel_size)
        if not self.output_padding:
            object.__setattr__(self, "output_padding", (0,) * order)
        if order > 3:
            raise SpecError(f"a convolution has 1, 2 or 3 spatial axes, got kernel_size={self.kernel_size}")
        if not order and (self.groups, self.padding_mode) != (1, "zeros"):
            raise SpecError(f"a linear layer has no groups and no padding, got {self.groups}, {self.padding_mode!r}")
        for name in ("stride", "padding", "dilation", "output_padding"):
            if len(getattr(self, name)) != order:
                raise SpecError(f"{name}={getattr(self, name)} must have {order} entries, as kernel_size has")
        least_padding, symmetric = min(self.output_padding, default=0), True
        for pair in self.padding:
            if not (isinstance(pair, tuple) and len(pair) == 2):
                raise SpecError(f"padding must be a pair (before, after) for every axis, got {self.padding}")
            least_padding, symmetric = min(least_padding, *pair), symmetric and pair[0] == pair[1]
        if min(self.kernel_size + self.stride + self.dilation + (self.in_channels, self.out_channels, self.groups)) < 1:
            raise SpecError(f"channels, groups, kernel_size, stride and dilation must be at least 1, got {self}")
        if least_padding < 0:
            raise SpecError(f"padding must not be negative, got {self.padding}, {self.output_padding}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise SpecError(
                f"groups={self.groups} must divide in_channels={self.in_channels} and out_channels={self.out_channels}"
            )
        if self.padding_mode not in PADDING_MODES:
            raise SpecError(f"padding_mode must be one of {PADDING_MODES}, got {self.padding_mode!r}")
        self._check_transposed(symmetric)

    def _check_transposed(self, symmetric: bool) -> None:
        if any(self.output_padding) and not self.transposed:
            raise SpecError(f"only a transposed convolution has output_padding, got {self.output_padding}")
        if self.transposed and (self.padding_mode != "zeros" or not symmetric):
            raise SpecError(f"a transposed convolution must have symmetric zero padding, got {self}")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ConvSpec:
        """Return the spec whose ``vars`` are ``data``. They may come from JSON, which turns tuples into lists.

        Args:
            data: A mapping from attributes to their values.

        Returns:
            The spec.

        Raises:
            SpecError: If the values do not describe a convolution.
            TypeError: If a value is missing, has the wrong type, or is not known.
        """
        return cls(**{key: as_tuples(value) for key, value in data.items()})

    @classmethod
    def parse(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        order: int | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        transposed: bool = False,
        output_padding: int | Sequence[int] = 0,
        bias: bool = False,
    ) -> ConvSpec:
        """Return the spec for arguments as ``torch.nn.Conv2d`` takes them.

        Args:
            in_channels: Number of input channels.
            out_channels: Number of output channels.
            kernel_size: An int, or one int per axis.
            order: Number of spatial axes. It is required if ``kernel_size`` is an int.
            stride: An int, or one int per axis.
            padding: An int, one int per axis, ``'same'`` or ``'valid'``.
            dilation: An int, or one int per axis.
            groups: Number of groups.
            padding_mode: ``'zeros'``, ``'reflect'``, ``'replicate'`` or ``'circular'``.
            transposed: Whether this is a transposed convolution.
            output_padding: An int, or one int per axis.
            bias: Whether the convolution has a bias.

        Returns:
            The spec.

        Raises:
            SpecError: If the values do not describe a convolution.
        """
        if order is None:
            if not isinstance(kernel_size, Sequence):
                raise SpecError(f"kernel_size={kernel_size!r} does not tell the number of axes: pass a tuple or order=")
            order = len(kernel_size)
        if order not in (0, 1, 2, 3):
            raise SpecError(f"order, the number of spatial axes, must be 0, 1, 2 or 3, got {order!r}")
        kernel = _per_axis("kernel_size", kernel_size, order)
        dilations = _per_axis("dilation", dilation, order)
        strides = _per_axis("stride", stride, order)
        return cls(
            in_channels=_to_int("in_channels", in_channels),
            out_channels=_to_int("out_channels", out_channels),
            kernel_size=kernel,
            stride=strides,
            padding=_parse_padding(padding, kernel, dilations, strides),
            dilation=dilations,
            groups=_to_int("groups", groups),
            padding_mode=padding_mode,
            transposed=transposed,
            output_padding=_per_axis("output_padding", output_padding, order),
            bias=bias,
        )

    @classmethod
    def linear(cls, in_channels: int, out_channels: int, *, bias: bool = False, transposed: bool = False) -> ConvSpec:
        """Return the spec of a linear layer.

        Args:
            in_channels: Number of input features.
            out_channels: Number of output features.
            bias: Whether the layer has a bias.
            transposed: Whether PyTorch holds its weight as ``(in, out)``.

        Returns:
            The spec, of order 0.

        Raises:
            SpecError: If the values do not describe a linear layer.
        """
        return cls.parse(in_channels, out_channels, (), bias=bias, transposed=transposed)

    @property
    def order(self) -> int:
        """The number of spatial axes: 0 for a linear layer."""
        return len(self.kernel_size)

    @property
    def kind(self) -> str:
        """``'linear'`` for a linear layer, ``'conv'`` for any other convolution."""
        return "conv" if self.kernel_size else "linear"

    @property
    def is_pointwise(self) -> bool:
        """Whether kernel size and stride are 1 and there is no padding. Transposed or not is then the same."""
        idle = {*self.kernel_size, *self.stride} <= {1} and not any(map(any, self.padding))
        return idle and not any(self.output_padding)

    @property
    def weight_shape(self) -> Sizes:
        """The shape ``(out, in / groups, *kernel)``, for transposed convolutions too."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def torch_weight_shape(self) -> Sizes:
        """The shape of the weight in PyTorch's layout: ``(in, out / groups, *kernel)`` for transposed convolutions."""
        transposed = (self.in_channels, self.out_channels // self.groups, *self.kernel_size)
        return transposed if self.transposed else self.weight_shape

    @property
    def params(self) -> int:
        """The number of parameters: the weight and the bias."""
        return math.prod(self.weight_shape) + (self.out_channels if self.bias else 0)

    @property
    def block(self) -> ConvSpec:
        """The convolution of one group. Without groups this is the spec itself."""
        if self.groups == 1:
            return self
        channels = self.in_channels // self.groups, self.out_channels // self.groups
        return replace(self, in_channels=channels[0], out_channels=channels[1], groups=1)

    def output_size(self, input_size: Sizes) -> Sizes:
        """Return the spatial size of the output.

        Args:
            input_size: The spatial size of the input, one int per axis. For a linear layer any number of positions.

        Returns:
            The spatial size of the output, one int per axis. A linear layer keeps its positions.
        """
        if not self.order:
            return input_size
        axes = zip(
            input_size, self.kernel_size, self.stride, self.padding, self.dilation, self.output_padding, strict=True
        )
        if self.transposed:
            return tuple((n - 1) * s - sum(p) + d * (k - 1) + extra + 1 for n, k, s, p, d, extra in axes)
        return tuple((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in axes)

    def has_batch(self, input_shape: Sizes) -> bool:
        """Whether an input of this shape has a batch axis.

        Args:
            input_shape: The shape of the input, as ``output_shape`` takes it.

        Returns:
            True for ``(batch, in, *size)``. An input of a linear layer has one if it has more than one axis.
        """
        return len(input_shape) == self.order + 2 if self.order else len(input_shape) > 1

    def output_shape(self, input_shape: Sizes) -> Sizes:
        """Return the shape of the output, with or without a batch axis.

        Args:
            input_shape: The shape of the input: ``(batch, in, *size)``, ``(in, *size)``, or ``(…, in)`` for a linear
                layer.

        Returns:
            The shape of the output.
        """
        if not self.order:
            return (*input_shape[:-1], self.out_channels)
        size = self.output_size(input_shape[-self.order :])
        return (*input_shape[: -self.order - 1], self.out_channels, *size)

    def for_output_size(self, input_size: Sizes, output_size: Sequence[int]) -> ConvSpec:
        """Return the transposed convolution with the ``output_padding`` that leads to an output size.

        Args:
            input_size: The spatial size of the input, one int per axis.
            output_size: The size of the output. Its last entries are the spatial ones.

        Returns:
            The convolution with this ``output_padding``.

        Raises:
            SpecError: If the convolution is not transposed, or has no output of this size.
        """
        least = replace(self, output_padding=(0,) * self.order).output_size(input_size)
        extra = tuple(size - low for size, low in zip(output_size[-self.order :], least, strict=True))
        if not self.transposed or any(not 0 <= e < s for e, s in zip(extra, self.stride, strict=True)):
            raise SpecError(f"{self} has no output of size {tuple(output_size)} for an input of size {input_size}")
        return replace(self, output_padding=extra)

    def macs(self, input_size: Sizes) -> int:
        """Return the multiply-accumulates (MACs) for one sample.

        Args:
            input_size: The spatial size of the input, one int per axis. For a linear layer any number of positions.

        Returns:
            The number of MACs. The additions of the bias are not counted.
        """
        return chain_macs((self,), input_size)

    def __str__(self) -> str:
        """A short form with the names that PyTorch uses. It leaves out what equals the default."""
        if not self.order:
            return f"Linear({self.in_channels}→{self.out_channels})"
        name = f"Conv{'Transpose' if self.transposed else ''}{self.order}d"
        parts = [f"{self.in_channels}→{self.out_channels}", "×".join(map(str, self.kernel_size))]
        for key, default in (("stride", 1), ("dilation", 1), ("output_padding", 0)):
            value: Sizes = getattr(self, key)
            if any(v != default for v in value):
                parts.append(f"{key} {_format_per_axis(value)}")
        if any(before or after for before, after in self.padding):
            symmetric = all(before == after for before, after in self.padding)
            shown = tuple(before for before, _ in self.padding) if symmetric else self.padding
            parts.append(f"padding {_format_per_axis(shown)}")
        parts += [f"groups {self.groups}"] if self.groups > 1 else []
        parts += [self.padding_mode] if self.padding_mode != "zeros" else []
        return f"{name}({', '.join(parts)})"


def chain_macs(stages: Sequence[ConvSpec], input_size: Sizes) -> int:
    """Return the MACs of ``stages``, run one after another on one sample of this spatial size."""
    total = 0
    for spec in stages:
        output_size = spec.output_size(input_size)
        total += math.prod(input_size if spec.transposed else output_size) * math.prod(spec.weight_shape)
        input_size = output_size
    return total


def chain_cost(stages: Sequence[ConvSpec], input_sizes: Sequence[Sizes] | None, *, tied: bool = False) -> Cost:
    """Return the cost of ``stages`` that run one after another.

    Args:
        stages: The convolutions of the chain.
        input_sizes: The spatial size of the input of every call, for one sample. The MACs of all calls add up. None
            if the sizes are not known.
        tied: Whether the chain shares the weights of another chain. Then only the biases count as parameters.
    """
    params = sum(spec.params if not tied else spec.out_channels for spec in stages if spec.bias or not tied)
    return Cost(params, None if input_sizes is None else sum(chain_macs(stages, size) for size in input_sizes))


def _per_axis(name: str, value: int | Sequence[int], order: int) -> Sizes:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(values) not in (1, order):
        raise SpecError(f"{name} must be an int or {order} ints, got {value!r}")
    ints = tuple(_to_int(name, v) for v in values)
    return ints * order if len(ints) == 1 else ints


def _to_int(name: str, value: object) -> int:
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise SpecError(f"{name} must consist of ints, got {value!r}")
    return int(value)


def pad_amounts(padding: Sequence[tuple[int, int]]) -> list[int]:
    """Return ``padding`` in the order of ``torch.nn.functional.pad``, which begins with the last axis."""
    return [amount for pair in reversed(padding) for amount in pair]


def same_padding(kernel: Sizes, dilation: Sizes) -> Padding:
    """Return the padding that keeps the size at stride 1. PyTorch puts the larger half of an odd total at the end."""
    totals = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
    return tuple((total // 2, total - total // 2) for total in totals)


def _parse_padding(padding: int | str | Sequence[int], kernel: Sizes, dilation: Sizes, stride: Sizes) -> Padding:
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        if any(s != 1 for s in stride):
            raise SpecError(f"padding='same' needs stride 1, got stride={stride}")
        return same_padding(kernel, dilation)
    if isinstance(padding, str):
        raise SpecError(f"padding must be ints, 'same' or 'valid', got {padding!r}")
    return tuple((p, p) for p in _per_axis("padding", padding, len(kernel)))


def _format_per_axis(values: tuple[object, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else str(values).replace(" ", "")


def as_tuples(value: Any) -> Any:
    """Return ``value`` with all lists, which JSON has instead of tuples, turned into tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def format_spec_forms(spec: ConvSpec | str | None) -> tuple[str, ...]:
    """Return the text of a spec, and its channels, kernel size and groups alone, for tables that are narrow."""
    text = str(spec or "")
    sizes = text.partition("(")[2].rstrip(")").split(", ")
    return (text, ", ".join([*sizes[:2], *(part for part in sizes[2:] if part.startswith("groups"))]))
