"""Stages of chains: pointwise convolutions, and the part of a convolution along some of its axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

from fxfact.conv import ConvSpec, Sizes

T = TypeVar("T")


def why_no_channel_modes(block: ConvSpec) -> str | None:
    """Return why a decomposition over channels and kernel positions does not apply, or None if it applies."""
    if set(block.kernel_size) == {1}:
        return "a 1×1 kernel is a matrix: use pointwise_svd"
    if block.in_channels == block.out_channels == 1:
        return "a depthwise kernel maps one channel to one and has no channel modes: try spatial_svd"
    return None


def pointwise(block: ConvSpec, in_channels: int, out_channels: int) -> ConvSpec:
    """Return a pointwise stage, which keeps the spatial size.

    Args:
        block: a convolution with the same number of spatial axes.
        in_channels: the input channels of the stage.
        out_channels: the output channels of the stage.

    Returns:
        A 1×1 convolution (1, 2 or 3 axes as ``block``) with stride 1, without padding and bias.
    """
    order = len(block.kernel_size)
    ones = (1,) * order
    return ConvSpec(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=ones,
        stride=ones,
        padding=((0, 0),) * order,
        dilation=ones,
    )


def stages_along(
    block: ConvSpec, axes: Sequence[Sizes], channels: Sequence[int], *, depthwise: bool = False
) -> tuple[ConvSpec, ...]:
    """Return a chain of stages, each along some of the spatial axes of a convolution.

    Args:
        block: the convolution. A stage has the kernel size, stride, padding and dilation of ``block`` on its own axes,
            and does nothing on the others.
        axes: the axes of each stage. A stage without axes is pointwise.
        channels: the channels before the first stage, between the stages, and after the last: one more than stages.
        depthwise: whether the stages that are not pointwise are depthwise.

    Returns:
        One stage for each entry of ``axes``.
    """
    return tuple(
        _along(block, own, before, after, groups=before if depthwise else 1) if own else pointwise(block, before, after)
        for own, (before, after) in zip(axes, pairwise(channels), strict=True)
    )


def _along(block: ConvSpec, axes: Sizes, in_channels: int, out_channels: int, *, groups: int) -> ConvSpec:
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


def split_axes(block: ConvSpec) -> tuple[Sizes, ...]:
    """Return the axes of each stage if every axis with a kernel size above 1 gets a stage of its own.

    An axis of kernel size 1 joins the next such stage, or the last one.
    """
    stages: list[Sizes] = []
    pending: Sizes = ()
    for axis, size in enumerate(block.kernel_size):
        pending = (*pending, axis)
        if size > 1:
            stages, pending = [*stages, pending], ()
    return (*stages[:-1], stages[-1] + pending) if stages else ()
