"""What a decomposition begins with, and the numbers of the stages behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxfact.errors import ArgumentTypeError, WeightError


def check_weight(weight: Tensor) -> None:
    """Raise WeightError unless the weight holds finite floating-point numbers."""
    if not weight.dtype.is_floating_point:
        raise WeightError(f"the weight must be floating-point, got {weight.dtype}. Convert the model to a float type.")
    if weight.is_meta:
        raise WeightError("the weight is on the meta device and has no values. Materialise it, or use weights='empty'.")
    if not bool(torch.isfinite(weight).all()):
        count = int((~torch.isfinite(weight)).sum())
        raise WeightError(f"the weight holds {count} NaN or Inf of {weight.numel()} values. Repair or exclude it.")


def check_generator(generator: object) -> None:
    """Raise ArgumentTypeError for anything but a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentTypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")


def cast_factors(parts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The stages' numbers in a dtype, the largest of each made alike where one would overflow. Raises WeightError where
    that does not help.
    """
    cast = [part.to(dtype) for part in parts]
    if dtype != torch.float16 or all(bool(part.isfinite().all()) for part in cast):
        return cast
    largest = [float(part.abs().max()) for part in parts]
    mean = math.prod(value ** (1 / len(parts)) for value in largest)
    if mean > torch.finfo(dtype).max:
        raise WeightError(f"the factors reach {mean:.1e}, more than {dtype} holds. Convert the model to float32.")
    return [(part * (mean / (value or 1.0))).to(dtype) for part, value in zip(parts, largest, strict=True)]


def pow2_scale(weight: Tensor) -> float:
    """What to divide a weight by, so that squares stay within single precision."""
    largest = float(weight.detach().abs().max())
    return largest if largest and not 1e-10 < largest < 1e10 else 1.0
