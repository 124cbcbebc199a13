"""How far apart two outputs of a network are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Every tensor in what a network returned: in tuples, lists, mappings and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_of(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for field in fields(output):
            yield from tensors_of(getattr(output, field.name))


def relative_error(expected: Any, found: Any) -> float:
    """‖found − expected‖ / ‖expected‖ over all floating-point tensors of two outputs; where there are none, over all.

    Infinite where the outputs differ in structure or shape. Inf and NaN must stand at the same places.
    """
    pairs = list(zip(_compared(expected), _compared(found), strict=False))
    if len(pairs) != len(_compared(expected)) or len(pairs) != len(_compared(found)):
        return math.inf
    if any(a.shape != b.shape for a, b in pairs):
        return math.inf
    missed = total = 0.0
    for one, other in pairs:
        a, b = _wide(one), _wide(other)
        alike = (a == b) | (a.isnan() & b.isnan())
        missed += float(torch.where(alike, 0.0, (b - a).abs()).square().sum())
        total += float(torch.where(a.isfinite(), a.abs(), 0.0).square().sum())
    return math.inf if math.isnan(missed) else math.sqrt(missed / total if total else missed)


def tolerance_for(output: Any) -> float:
    """What rounding may do to this output, relative: 1e-10 in double, 1e-4 in single, 5e-2 in half precision."""
    dtypes = {tensor.dtype for tensor in tensors_of(output) if tensor.is_floating_point()}
    return max((_TOLERANCE.get(dtype, _HALF_TOLERANCE) for dtype in dtypes), default=0.0)


def _compared(output: Any) -> list[Tensor]:
    tensors = list(tensors_of(output))
    floats = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    return floats or tensors


def _wide(tensor: Tensor) -> Tensor:
    plain = tensor.detach().dequantize() if tensor.is_quantized else tensor.detach()
    plain = plain.to_dense() if plain.layout != torch.strided else plain
    return plain.to(torch.complex128 if plain.is_complex() else torch.float64)
