"""Runs a convolution of any order, and turns weights into PyTorch's layout and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, TypeGuard

import torch.nn.functional as F
from torch import Tensor

from fxfact.conv.spec import ConvSpec, pad_amounts
from fxfact.errors import ArgumentError

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def run_weight(spec: ConvSpec, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Run a convolution of any order with these tensors. torch.fx can trace it: ``spec`` decides everything else."""
    if not spec.order:
        return F.linear(x, weight, bias)
    if spec.order > 3:
        return _run_folded(spec, weight, bias, x)
    if spec.transposed:
        padding = [before for before, _ in spec.padding]
        weight = to_torch(spec, weight)
        transposed = _CONV_TRANSPOSE[spec.order - 1]
        return transposed(x, weight, bias, spec.stride, padding, spec.output_padding, spec.groups, spec.dilation)
    native_padding = spec.padding_mode == "zeros" and all(before == after for before, after in spec.padding)
    if not native_padding:
        x = padded(spec, x)
    padding = [before for before, _ in spec.padding] if native_padding else [0] * spec.order
    return _CONV[spec.order - 1](x, weight, bias, spec.stride, padding, spec.dilation, spec.groups)


def _run_folded(spec: ConvSpec, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Run a convolution of more than three axes.

    An axis along which it does nothing is folded into the batch. If more than three axes are left, it is the sum of the
    convolutions along the last three, over the positions of the kernel along the others.
    """
    active = [axis for axis in range(spec.order) if not _is_idle(spec, axis)]
    looped, native = active[:-3], active[-3:] or [spec.order - 1]
    folded = [axis for axis in range(spec.order) if axis not in native]
    inner = _along(spec, native)
    windows = _windows(spec, looped, x.reshape((-1,) + x.shape[-spec.order - 1 :]))  # noqa: RUF005 (torch.fx)
    total = None
    for position in product(*(range(spec.kernel_size[axis]) for axis in looped)):
        at = dict(zip(looped, position, strict=True))
        tap: Any = (..., *(slice(None) if axis in native else at.get(axis, 0) for axis in range(spec.order)))
        here: Any = (..., *position)
        part = windows[here].permute(0, *(axis + 2 for axis in folded), 1, *(axis + 2 for axis in native))
        output = run_weight(inner, weight[tap], bias if total is None else None, part.flatten(0, len(folded)))
        total = output if total is None else total + output
    assert total is not None
    places = [folded.index(a) + 1 if a in folded else native.index(a) + 2 + len(folded) for a in range(spec.order)]
    total = total.reshape(part.shape[: len(folded) + 1] + total.shape[1:]).permute(0, len(folded) + 1, *places)
    return total.reshape(x.shape[: -spec.order - 1] + total.shape[1:])


def _is_idle(spec: ConvSpec, axis: int) -> bool:
    """Whether a convolution does nothing along an axis."""
    sizes = (spec.kernel_size[axis], spec.stride[axis], spec.padding[axis], spec.output_padding[axis])
    return sizes == (1, 1, (0, 0), 0)


def _along(spec: ConvSpec, axes: Sequence[int]) -> ConvSpec:
    """Return the convolution along some of the axes."""
    names = ("kernel_size", "stride", "padding", "dilation", "output_padding")
    changes: dict[str, Any] = {name: tuple(getattr(spec, name)[axis] for axis in axes) for name in names}
    return replace(spec, **changes)


def _windows(spec: ConvSpec, axes: Sequence[int], x: Tensor) -> Tensor:
    """Return the inputs (batch, in, *size) at each position of the kernel along some axes.

    The result is (batch, in, *size, *kernel), a view of the padded input. Along these axes its sizes are those of the
    output. A transposed convolution reads an input with zeros between its values.
    """
    order, reach = spec.order, [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]
    if spec.transposed:
        amounts = [(0, 0)] * order
        for axis in axes:
            spaced = F.pad(
                x.unsqueeze(axis + 3), pad_amounts([(0, spec.stride[axis] - 1), *[(0, 0)] * (order - axis - 1)])
            )
            x = spaced.flatten(axis + 2, axis + 3)
            before, after = (reach[axis] - crop for crop in spec.padding[axis])
            amounts[axis] = (before, after + spec.output_padding[axis] + 1 - spec.stride[axis])
        x = F.pad(x, pad_amounts(amounts))
    else:
        x = padded(replace(spec, padding=tuple(p if a in axes else (0, 0) for a, p in enumerate(spec.padding))), x)
    for axis in axes:
        step = 1 if spec.transposed else spec.stride[axis]
        positions = x.unfold(axis + 2, reach[axis] + 1, step)[..., :: spec.dilation[axis]]
        x = positions.flip(-1) if spec.transposed else positions
    return x


def takes_output_size(output_size: Sequence[int] | None, spec: ConvSpec) -> TypeGuard[Sequence[int]]:
    """Whether a convolution is called with an output size. Raises ArgumentError if it is not transposed."""
    if spec.transposed or output_size is None:
        return output_size is not None
    if isinstance(output_size, Sequence):  # not a proxy, which torch.fx passes for every argument of a root module
        raise ArgumentError("only a transposed convolution takes an output_size. Call this one without it.")
    return False


def padded(spec: ConvSpec, x: Tensor) -> Tensor:
    """Return ``x`` with the padding of a convolution that is not transposed."""
    if spec.padding_mode == "zeros" or spec.order <= 3:
        mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
        return F.pad(x, pad_amounts(spec.padding), mode=mode)
    for axis, amounts in enumerate(spec.padding):
        if any(amounts):  # PyTorch only pads the last three axes in these modes
            lines = x.movedim(axis - spec.order, -1)
            padded_lines = F.pad(lines.flatten(0, -3), amounts, mode=spec.padding_mode)
            x = padded_lines.reshape(lines.shape[:-2] + padded_lines.shape[-2:]).movedim(-1, axis - spec.order)
    return x


def to_torch(spec: ConvSpec, weight: Tensor) -> Tensor:
    """Return a weight (out, in / groups, *kernel) in PyTorch's layout, (in, out / groups, *kernel) if transposed."""
    return with_default_strides(_swap_channels(weight, spec.groups)) if spec.transposed else weight


def from_torch(spec: ConvSpec, weight: Tensor) -> Tensor:
    """Return a weight in PyTorch's layout as (out, in / groups, *kernel): a view, if possible."""
    return _swap_channels(weight, spec.groups) if spec.transposed else weight


def with_default_strides(weight: Tensor) -> Tensor:
    """Return a contiguous tensor that also has default strides along axes of size 1, where any stride is valid.

    PyTorch 2.13 takes those strides for a memory format and can crash, for example in a grouped ``conv1d`` with
    kernel size 1 and dilation 3.
    """
    return weight.reshape(-1).reshape(weight.shape)


def _swap_channels(weight: Any, groups: int) -> Tensor:
    """Swap the input and output channels of each group."""
    swapped: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return swapped
