"""Transduction of a layer: one more axis of its kernel, at first zero but at its center (Kossaifi et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from fxfact.conv import ConvSpec, Sizes, Skip, read_conv, write_conv_module
from fxfact.errors import ArgumentError, ArgumentTypeError, RefusedError, check_int
from fxfact.factorizations import TT, CPFactorized, CPMobilenet, Tucker
from fxfact.nn.structure import Structure


def spec_with_axis(
    spec: ConvSpec, axis: int, kernel_size: int, *, stride: int, padding: int | None, dilation: int
) -> ConvSpec:
    """Return a convolution with one more axis.

    Without ``padding`` it has that with which output t reads input t at the center of the kernel. Raises ArgumentError.
    """
    kernel_size, dilation = check_int("kernel_size", kernel_size, 1), check_int("dilation", dilation, 1)
    axis = check_int("axis", axis, 0, spec.order)
    center = (kernel_size - 1) // 2
    pair = (center * dilation, (kernel_size - 1 - center) * dilation)
    if padding is not None:
        pair = (check_int("padding", padding, 0),) * 2
    if spec.transposed and pair[0] != pair[1]:
        raise ArgumentError(f"a transposed convolution has no center with kernel_size={kernel_size}. Pass an odd one.")

    def insert(values: Sequence[int], value: int) -> Sizes:
        return (*values[:axis], value, *values[axis:])

    return replace(
        spec,
        kernel_size=insert(spec.kernel_size, kernel_size),
        stride=insert(spec.stride, check_int("stride", stride, 1)),
        padding=(*spec.padding[:axis], pair, *spec.padding[axis:]),
        dilation=insert(spec.dilation, dilation),
        output_padding=insert(spec.output_padding, 0),
    )


def kernel_with_axis(weight: Tensor, axis: int, kernel_size: int) -> Tensor:
    """Return a kernel with one more spatial axis, zero but at its center."""
    wide = weight.unsqueeze(axis + 2)
    if kernel_size == 1:
        return wide
    new = wide.new_zeros(*wide.shape[: axis + 2], kernel_size, *wide.shape[axis + 3 :])
    new.select(axis + 2, (kernel_size - 1) // 2).copy_(weight)
    return new


def stages_with_axis(
    structure: Structure, weights: Sequence[Tensor], spec: ConvSpec, axis: int
) -> tuple[Structure, list[Tensor], int]:
    """Return a layer's structure and weights (out, in / groups, *kernel) with one more axis, and the stage that has it.

    ``spec`` is the convolution with the axis. Raises RefusedError.
    """
    method, old, kernel_size = structure.factorization, structure.spec, spec.kernel_size[axis]
    if not isinstance(method, CPFactorized | CPMobilenet | Tucker | TT):
        raise RefusedError(f"{method.name} has no transduction. Make the layer with 'cp', 'tucker' or 'tt'.")
    place = sum(size > 1 for size in old.kernel_size[:axis])  # of a stage of its own, among those along single axes
    rank = structure.rank
    if isinstance(method, TT) and kernel_size > 1:
        rank = (*rank[: place + 1], *rank[place:])
    new = Structure.of(spec, method, rank, structure.implementation)
    if len(new.stages) > len(structure.stages):  # the axis has a stage of its own
        widened = [weight.unsqueeze(axis + 2) for weight in weights]
        stage = new.stages[place + 1]
        blocks = torch.eye(stage.weight_shape[1]).repeat(stage.out_channels // stage.weight_shape[1], 1).to(weights[0])
        center = blocks.reshape(*blocks.shape, *[1] * old.order)
        return (
            new,
            [*widened[: place + 1], kernel_with_axis(center, axis, kernel_size), *widened[place + 1 :]],
            place + 1,
        )
    kernels = [stage.kernel_size for stage in new.stages]
    holder = next(k for k, kernel in enumerate(kernels) if kernel[axis] == kernel_size and max(kernel) > 1)
    made = [kernel_with_axis(w, axis, kernel_size if k == holder else 1) for k, w in enumerate(weights)]
    return new, made, holder


def transduct_conv(
    conv: nn.Module, kernel_size: int, axis: int = 0, *, stride: int = 1, padding: int | None = None, dilation: int = 1
) -> nn.Module:
    """Return a dense convolution with one more spatial axis, whose kernel at first is zero but at its center.

    Args:
        conv: an ``nn.Conv1d/2d/3d``, ``nn.ConvTranspose1d/2d/3d`` or ``ConvNd``. It is not changed.
        kernel_size: the size of the kernel along the new axis.
        axis: the position of the new axis among the spatial ones: 0 is before all of them.
        stride: the stride along the new axis.
        padding: the padding along the new axis. None means that which keeps the number of frames.
        dilation: the dilation along the new axis.

    Returns:
        The convolution, which shares no tensor with ``conv``, after a pad module if it needs uneven padding.

    Raises:
        ArgumentTypeError: if ``conv`` is no convolution.
        ArgumentError: if an argument is out of its range, or the padding of a transposed one would be uneven.
        RefusedError: if it is no plain convolution.
    """
    if not isinstance(conv, nn.Module) or isinstance(conv, nn.Linear):
        raise ArgumentTypeError(f"conv must be a convolution, got {type(conv).__name__}")
    layer = read_conv(conv)
    if isinstance(layer, Skip):
        raise RefusedError(f"{type(conv).__name__}: {layer.reason}")
    spec = spec_with_axis(layer.spec, axis, kernel_size, stride=stride, padding=padding, dilation=dilation)
    weight = kernel_with_axis(layer.weight.detach(), axis, kernel_size).clone()
    bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_(layer.bias.requires_grad)
    made = write_conv_module(spec, weight.requires_grad_(cast(Tensor, conv.weight).requires_grad), bias)
    return made.train(conv.training)
