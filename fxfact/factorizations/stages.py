"""The stages of which factorizations are made: pointwise ones, and what of a convolution is done along some axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from fxfact.conv import ConvSpec, Sizes

T = TypeVar("T")


def no_channel_modes(block: ConvSpec) -> str | None:
    """Why a factorization over channels and space has nothing to work on, or None."""
    if set(block.kernel_size) == {1}:
        return "a 1×1 kernel is a matrix: pointwise_svd factorizes it"
    if block.in_channels == block.out_channels == 1:
        return "a depthwise kernel, one channel to one, has no channel modes: spatial_svd may split it"
    return None


def pointwise(block: ConvSpec, in_channels: int, out_channels: int) -> ConvSpec:
    """A 1×1 stage that keeps sizes."""
    return ConvSpec.parse(in_channels, out_channels, 1, order=block.order)


def spatial(block: ConvSpec, axes: Sizes, in_channels: int, out_channels: int, *, groups: int = 1) -> ConvSpec:
    """A stage that does on ``axes`` what ``block`` does there, and nothing on the other axes."""

    def on_axes(values: Sequence[T], neutral: T) -> tuple[T, ...]:
        return tuple(value if axis in axes else neutral for axis, value in enumerate(values))

    padding = on_axes(block.padding, (0, 0))
    return replace(
        block,
        in_channels=in_channels,
        out_channels=out_channels,
        groups=groups,
        kernel_size=on_axes(block.kernel_size, 1),
        stride=on_axes(block.stride, 1),
        padding=padding,
        padding_mode=block.padding_mode if any(map(any, padding)) else "zeros",
        dilation=on_axes(block.dilation, 1),
        output_padding=on_axes(block.output_padding, 0),
    )


def spatial_axes(block: ConvSpec) -> tuple[Sizes, ...]:
    """The axes by stage where they are split: an axis of kernel size 1 rides the next stage, or the last."""
    stages: list[Sizes] = []
    riding: Sizes = ()
    for axis, size in enumerate(block.kernel_size):
        riding = (*riding, axis)
        if size > 1:
            stages, riding = [*stages, riding], ()
    return (*stages[:-1], stages[-1] + riding) if stages else ()
