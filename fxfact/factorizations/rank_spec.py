"""The one door where what a caller asks for, an int, a tuple, a fraction or 'same', becomes a rank."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Literal

from fxfact.conv import ConvSpec, Skip
from fxfact.errors import ArgumentTypeError, RankError
from fxfact.factorizations.base import Factorization, Rank

RankSpec = int | float | str | Sequence[int]
ParsedRank = int | float | Rank


def parse_rank_spec(request: object) -> ParsedRank:
    """An int, a tuple of ints, or a float fraction ('same' is 1.0). Raises RankError, ArgumentTypeError."""
    way_out = "Pass 'same', a fraction of the parameters such as 0.5, an int, or a tuple of ints."
    if isinstance(request, str):
        if request != "same":
            raise RankError(f"the only rank with a name is 'same', got {request!r}. {way_out}")
        return 1.0
    if isinstance(request, bool | bytes) or not isinstance(request, numbers.Real | Sequence):
        raise ArgumentTypeError(f"a rank cannot be a {type(request).__name__} ({request!r}). {way_out}")
    if isinstance(request, Sequence):
        parsed = tuple(parse_rank_spec(entry) for entry in request)
        if not parsed or not all(isinstance(entry, int) for entry in parsed):
            raise RankError(f"a tuple of ranks holds ints, got {request!r}. {way_out}")
        return tuple(int(entry) for entry in parsed if isinstance(entry, int))
    value = int(request) if isinstance(request, numbers.Integral) else float(request)
    if value <= 0 or (isinstance(value, float) and not math.isfinite(value)):
        raise RankError(f"a rank must be positive and finite, got {request!r}. {way_out}")
    if isinstance(value, float) and value > 1 and value.is_integer():
        raise RankError(
            f"{request!r} would be a fraction of {100 * value:.0f} %. Pass {int(value)} for the rank {int(value)}."
        )
    return value


def resolve_rank(
    factorization: Factorization,
    spec: ConvSpec,
    request: ParsedRank,
    *,
    clip: bool,
    rule: Literal["parameters", "tensorly"] = "parameters",
) -> Rank | Skip:
    """The rank asked for on this convolution, or a Skip with the reason why none fits.

    A fraction is the largest feasible rank, its entries proportional, whose layout has at most that fraction of the
    parameters (bias included); by the rule 'tensorly' it is what TensorLy's rank rules give. With ``clip`` a rank too
    large is lowered to what is feasible; without, ``layout`` will raise RankError for it.
    """
    if refused := factorization.rejects(spec):
        return refused
    most = factorization.max_rank(spec)
    if isinstance(request, float):
        if rule == "tensorly":
            return factorization.tensorly_rank(spec, request)
        rank = factorization.rank_within(spec, request)
        return rank or Skip(f"even at rank 1 {factorization.name} has more than {request:.4g} of the parameters")
    rank = (request,) * len(most) if isinstance(request, int) else request
    if len(rank) != len(most):
        raise RankError(
            f"{factorization.name} has {len(most)} ranks on {spec}, got {rank}. Pass {len(most)}, or an int."
        )
    return factorization.clip(spec, rank) if clip or (isinstance(request, int) and len(most) > 1) else rank
