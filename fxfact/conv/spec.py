"""What a convolution is, apart from its numbers."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxfact.errors import SpecError

Sizes = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True, kw_only=True)
class ConvSpec:
    """Everything about a convolution except its numbers. Tuples have one entry per spatial axis (1, 2 or 3 axes).

    ``padding`` is ``(before, after)`` per axis, so that an int, a tuple and ``'same'`` are one thing.
    Raises SpecError where the numbers do not describe a convolution.
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
        if not 1 <= order <= 3:
            raise SpecError(f"a convolution has 1, 2 or 3 spatial axes, got kernel_size={self.kernel_size}")
        for name in ("stride", "padding", "dilation", "output_padding"):
            if len(getattr(self, name)) != order:
                raise SpecError(f"{name}={getattr(self, name)} must have {order} entries, as kernel_size has")
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.padding):
            raise SpecError(f"padding is a pair (before, after) for every axis, got {self.padding}")
        if min(self.kernel_size + self.stride + self.dilation + (self.in_channels, self.out_channels, self.groups)) < 1:
            raise SpecError(f"channels, groups, kernel_size, stride and dilation must be at least 1, got {self}")
        if min(min(pair) for pair in self.padding) < 0 or min(self.output_padding) < 0:
            raise SpecError(f"padding must not be negative, got {self.padding}, {self.output_padding}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise SpecError(
                f"groups={self.groups} must divide in_channels={self.in_channels} and out_channels={self.out_channels}"
            )
        if self.padding_mode not in PADDING_MODES:
            raise SpecError(f"padding_mode must be one of {PADDING_MODES}, got {self.padding_mode!r}")
        if any(self.output_padding) and not self.transposed:
            raise SpecError(f"only a transposed convolution has output_padding, got {self.output_padding}")
        even = all(before == after for before, after in self.padding)
        if self.transposed and (self.padding_mode != "zeros" or not even):
            raise SpecError(f"a transposed convolution has symmetric zero padding only, got {self}")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ConvSpec:
        """The inverse of ``vars``, also after JSON, which has lists for tuples. Raises SpecError, TypeError."""
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
        """From the spellings that PyTorch takes: ints, tuples and the paddings 'same' and 'valid'.

        ``order``, the number of spatial axes, is needed where kernel_size is an int.
        """
        if order is None:
            if not isinstance(kernel_size, Sequence):
                raise SpecError(f"kernel_size={kernel_size!r} says no number of axes: pass order=, or a tuple")
            order = len(kernel_size)
        if order not in (1, 2, 3):
            raise SpecError(f"order, the number of spatial axes, must be 1, 2 or 3, got {order!r}")
        kernel = _per_axis("kernel_size", kernel_size, order)
        dilations = _per_axis("dilation", dilation, order)
        strides = _per_axis("stride", stride, order)
        return cls(
            in_channels=_integer("in_channels", in_channels),
            out_channels=_integer("out_channels", out_channels),
            kernel_size=kernel,
            stride=strides,
            padding=_parse_padding(padding, kernel, dilations, strides),
            dilation=dilations,
            groups=_integer("groups", groups),
            padding_mode=padding_mode,
            transposed=transposed,
            output_padding=_per_axis("output_padding", output_padding, order),
            bias=bias,
        )

    @property
    def order(self) -> int:
        """The number of spatial axes."""
        return len(self.kernel_size)

    @property
    def is_pointwise(self) -> bool:
        """Whether it does nothing in space: then transposed or not is the same."""
        idle = {*self.kernel_size, *self.stride} == {1} and not any(map(any, self.padding))
        return idle and not any(self.output_padding)

    @property
    def weight_shape(self) -> Sizes:
        """(out, in / groups, *kernel), transposed or not."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def params(self) -> int:
        """Numbers in the weight and the bias."""
        return math.prod(self.weight_shape) + (self.out_channels if self.bias else 0)

    @property
    def block(self) -> ConvSpec:
        """The convolution of one group."""
        channels = self.in_channels // self.groups, self.out_channels // self.groups
        return replace(self, in_channels=channels[0], out_channels=channels[1], groups=1)

    def output_size(self, input_size: Sizes) -> Sizes:
        """Spatial size behind this convolution, for the spatial size before it."""
        axes = zip(
            input_size, self.kernel_size, self.stride, self.padding, self.dilation, self.output_padding, strict=True
        )
        if self.transposed:
            return tuple((n - 1) * s - sum(p) + d * (k - 1) + extra + 1 for n, k, s, p, d, extra in axes)
        return tuple((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in axes)

    def macs(self, input_size: Sizes) -> int:
        """Multiply-accumulates for one sample of this spatial size; the bias is not counted."""
        positions = input_size if self.transposed else self.output_size(input_size)
        return math.prod(positions) * math.prod(self.weight_shape)

    def __str__(self) -> str:
        """Short and in the words of PyTorch, naming only what differs from the defaults."""
        name = f"Conv{'Transpose' if self.transposed else ''}{self.order}d"
        parts = [f"{self.in_channels}→{self.out_channels}", "×".join(map(str, self.kernel_size))]
        for key, neutral in (("stride", 1), ("dilation", 1), ("output_padding", 0)):
            value: Sizes = getattr(self, key)
            if any(v != neutral for v in value):
                parts.append(f"{key} {_short(value)}")
        if any(before or after for before, after in self.padding):
            even = all(before == after for before, after in self.padding)
            parts.append(f"padding {_short(tuple(p[0] for p in self.padding) if even else self.padding)}")
        parts += [f"groups {self.groups}"] if self.groups > 1 else []
        parts += [self.padding_mode] if self.padding_mode != "zeros" else []
        return f"{name}({', '.join(parts)})"


def _per_axis(name: str, value: int | Sequence[int], order: int) -> Sizes:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    values = values * order if len(values) == 1 else values
    if len(values) != order:
        raise SpecError(f"{name} must be an int or {order} ints, got {value!r}")
    return tuple(_integer(name, v) for v in values)


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise SpecError(f"{name} must be made of ints, got {value!r}")
    return int(value)


def pad_amounts(padding: Sequence[tuple[int, int]]) -> list[int]:
    """``padding`` by axis as ``torch.nn.functional.pad`` takes it: the last axis first."""
    return [amount for pair in reversed(padding) for amount in pair]


def same_padding(kernel: Sizes, dilation: Sizes) -> Padding:
    """What keeps the size at stride 1; of an odd total PyTorch puts the larger half behind."""
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


def _short(values: tuple[object, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else str(values).replace(" ", "")


def as_tuples(value: Any) -> Any:
    """Lists, as JSON has them, made tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value
