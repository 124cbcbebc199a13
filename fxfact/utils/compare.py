"""Compares the outputs of two networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fxfact.utils.storage import plain_tensors

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Yield every tensor in the output of a network, also those in containers and in attributes of objects."""
    return (tensor for _, tensor in named_tensors(output))


def named_tensors(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in the output of a network with its place: keys, indices and attributes joined by dots.

    The place of an output that is a tensor is "".
    """
    queue, seen = [("", output)], set()
    while queue:
        place, value = queue.pop(0)
        if isinstance(value, Tensor):
            yield place, value
        elif id(value) not in seen:
            seen.add(id(value))
            prefix = f"{place}." if place else ""
            queue = [(f"{prefix}{key}", item) for key, item in _items_of(value)] + queue


def map_tensors(change: Callable[[Tensor], Any], output: Any) -> Any:
    """Return a copy of an output in which every tensor is replaced by ``change(tensor)``. Other values stay."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(map_tensors(change, value) for value in output))
    if isinstance(output, list | tuple | set):
        return type(output)(map_tensors(change, value) for value in output)
    if not _items_of(output):
        return output
    result = copy.copy(output)
    for key, value in _items_of(output):
        if isinstance(output, Mapping):
            result[key] = map_tensors(change, value)
        else:
            vars(result)[key] = map_tensors(change, value)
    return result


def _items_of(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple | set):
        fields = getattr(value, "_fields", None)
        return list(zip(fields or range(len(value)), value, strict=True))
    plain = hasattr(value, "__dict__") and not isinstance(value, type | torch.nn.Module)
    return list(vars(value).items()) if plain else []


def plain_tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors in an output, detached, with the tensors inside a wrapper subclass in its place."""
    return [plain for tensor in tensors_of(output) for plain in plain_tensors(tensor.detach())]


def relative_error(expected: Any, found: Any) -> float:
    """Return ‖found − expected‖ / ‖expected‖, the largest over all pairs of floating-point tensors of two outputs.

    Of a wrapper subclass the tensors inside are compared. If there are no floating-point tensors, all are compared. The
    error is infinite if the outputs differ in the number or the shapes of the tensors, contain no tensors, or have NaN
    or Inf at different positions.
    """
    pairs = _tensors_to_compare(expected), _tensors_to_compare(found)
    if not pairs[0] or [tensor.shape for tensor in pairs[0]] != [tensor.shape for tensor in pairs[1]]:
        return math.inf
    return max(_relative_error(_widened(one), _widened(other)) for one, other in zip(*pairs, strict=True))


def difference(expected: Any, found: Any, *, strictness: float) -> str:
    """Describe the first difference between the outputs of a model and of its copy, or return "" if there is none.

    The number, dtypes and shapes of their tensors must be equal. The relative error of each tensor may be up to
    ``strictness`` times ``tolerance_for``.
    """
    tensors, others = plain_tensors_of(expected), plain_tensors_of(found)
    if not tensors:
        return "its output holds no tensors to compare"
    kinds = [[(tensor.dtype, tuple(tensor.shape)) for tensor in each] for each in (tensors, others)]
    if kinds[0] != kinds[1]:
        return f"its output is {_format_kinds(kinds[1])}, the model's {_format_kinds(kinds[0])}"
    for one, other in zip(tensors, others, strict=True):
        error = _relative_error(_widened(one), _widened(other))
        if not error <= strictness * tolerance_for(one):
            return f"its output differs from the model's by {error:.1e} (relative)"
    return ""


def tolerance_for(output: Any) -> float:
    """Return the relative error that rounding may cause: 1e-10 in double, 1e-4 in single, 5e-2 in half precision."""
    dtypes = {t.dtype.to_real() for t in tensors_of(output) if t.is_floating_point() or t.is_complex()}
    return max((_TOLERANCE.get(dtype, _HALF_TOLERANCE) for dtype in dtypes), default=0.0)


def _relative_error(expected: Tensor, found: Tensor) -> float:
    equal = (expected == found) | (expected.isnan() & found.isnan())
    error = float(torch.where(equal, 0.0, (found - expected).abs()).square().sum())
    total = float(torch.where(expected.isfinite(), expected.abs(), 0.0).square().sum())
    return math.inf if math.isnan(error) else math.sqrt(error / total if total else error)


def _format_kinds(kinds: list[Any]) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')} {shape}" for dtype, shape in kinds) or "without tensors"


def _tensors_to_compare(output: Any) -> list[Tensor]:
    tensors = plain_tensors_of(output)
    floats = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
    return floats or tensors


def _widened(tensor: Tensor) -> Tensor:
    """Return a dense tensor in double precision."""
    plain = tensor.detach().dequantize() if tensor.is_quantized else tensor.detach()
    plain = plain.to_dense() if plain.layout != torch.strided else plain
    return plain.to(torch.complex128 if plain.is_complex() else torch.float64)
