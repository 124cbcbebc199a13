"""Ranks as callers write them: an int, a tuple, a fraction of the parameters, or 'same'."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Literal

from fxfact.conv import ConvSpec, Skip
from fxfact.errors import ArgumentTypeError, RankError
from fxfact.factorizations.base import Factorization
from fxfact.factorizations.stages import Rank

RankSpec = int | float | str | Sequence[int]
ParsedRank = int | float | Rank


def parse_rank_spec(request: object) -> ParsedRank:
    """Return a rank in one of three forms.

    Args:
        request: an int, a sequence of ints, a fraction of the parameters as a float, or 'same' for the fraction 1.

    Returns:
        An int, a tuple of ints, or a float.

    Raises:
        RankError: if the value cannot be a rank.
        ArgumentTypeError: if the type cannot be one.
    """
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
            raise RankError(f"a tuple of ranks must hold ints, got {request!r}. {way_out}")
        return tuple(int(entry) for entry in parsed if isinstance(entry, int))
    value = int(request) if isinstance(request, numbers.Integral) else float(request)
    if value <= 0 or (isinstance(value, float) and not math.isfinite(value)):
        raise RankError(f"a rank must be positive and finite, got {request!r}. {way_out}")
    if isinstance(value, float) and value > 1 and value.is_integer():
        raise RankError(
            f"{request!r} would mean {100 * value:.0f} % of the parameters. "
            f"Pass {int(value)} for the rank {int(value)}."
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
    """Return the rank that a request means for one convolution.

    Args:
        factorization: the factorization.
        spec: the convolution.
        request: the rank. An int applies to every entry. A fraction means the largest proportional rank whose chain has
            at most this fraction of the parameters, bias included.
        clip: whether a rank that is too large is lowered. If not, ``layout`` will raise RankError for it. An int that
            is applied to several entries is always lowered.
        rule: 'parameters', or 'tensorly' for the rule of TensorLy for fractions.

    Returns:
        The rank of each group, or the reason why there is none.

    Raises:
        RankError: if a tuple has another number of entries than the factorization.
    """
    if refused := factorization.rejects(spec):
        return refused
    if isinstance(request, float):
        if rule == "tensorly":
            return factorization.tensorly_rank(spec, request)
        rank = factorization.rank_within(spec, request)
        return rank or Skip(f"even at rank 1 {factorization.name} has more than {request:.4g} of the parameters")
    entries = len(factorization.max_rank(spec))
    rank = (request,) * entries if isinstance(request, int) else request
    if len(rank) != entries:
        raise RankError(
            f"{factorization.name} has {entries} ranks on {spec}, got {rank}. Pass {entries} ints, or one for all."
        )
    return factorization.clip(spec, rank) if clip or (isinstance(request, int) and entries > 1) else rank
