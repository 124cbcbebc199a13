"""How far apart two outputs of a network are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Every tensor in what a network returned: in containers, and in the attributes of objects."""
    waiting, seen = [output], set()
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Mapping):
                waiting = [*value.values(), *waiting]
            elif isinstance(value, list | tuple | set):
                waiting = [*value, *waiting]
            elif hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module):
                waiting = [*vars(value).values(), *waiting]


def relative_error(expected: Any, found: Any) -> float:
    """‖found − expected‖ / ‖expected‖ of the floating-point tensor of two outputs for which it is largest; where there
    are none, of any tensor.

    Infinite where the outputs differ in structure or shape, or hold no tensors. Inf and NaN must stand at the same
    places.
    """
    ours, theirs = _compared(expected), _compared(found)
    if not ours or [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        return math.inf
    return max(_error(_wide(one), _wide(other)) for one, other in zip(ours, theirs, strict=True))


def difference(expected: Any, found: Any, *, strictness: float) -> str:
    """What tells two outputs of the same kernels apart: number, types, shapes, integers, or numbers by more than
    ``strictness`` times ``tolerance_for``; empty where nothing does.
    """
    ours, theirs = list(tensors_of(expected)), list(tensors_of(found))
    if not ours:
        return "its output holds no tensors to compare"
    kinds = [[(tensor.dtype, tuple(tensor.shape)) for tensor in tensors] for tensors in (ours, theirs)]
    if kinds[0] != kinds[1]:
        return f"its output is {_shown(kinds[1])}, the model's {_shown(kinds[0])}"
    for one, other in zip(ours, theirs, strict=True):
        error = _error(_wide(one), _wide(other))
        if not error <= strictness * tolerance_for(one):
            return f"its output differs from the model's by {error:.1e} (relative)"
    return ""


def tolerance_for(output: Any) -> float:
    """What rounding may do to this output, relative: 1e-10 in double, 1e-4 in single, 5e-2 in half precision."""
    dtypes = {t.dtype.to_real() for t in tensors_of(output) if t.is_floating_point() or t.is_complex()}
    return max((_TOLERANCE.get(dtype, _HALF_TOLERANCE) for dtype in dtypes), default=0.0)


def _error(expected: Tensor, found: Tensor) -> float:
    alike = (expected == found) | (expected.isnan() & found.isnan())
    missed = float(torch.where(alike, 0.0, (found - expected).abs()).square().sum())
    total = float(torch.where(expected.isfinite(), expected.abs(), 0.0).square().sum())
    return math.inf if math.isnan(missed) else math.sqrt(missed / total if total else missed)


def _shown(kinds: list[Any]) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')} {shape}" for dtype, shape in kinds) or "without tensors"


def _compared(output: Any) -> list[Tensor]:
    tensors = list(tensors_of(output))
    floats = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    return floats or tensors


def _wide(tensor: Tensor) -> Tensor:
    plain = tensor.detach().dequantize() if tensor.is_quantized else tensor.detach()
    plain = plain.to_dense() if plain.layout != torch.strided else plain
    return plain.to(torch.complex128 if plain.is_complex() else torch.float64)
