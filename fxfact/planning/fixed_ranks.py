"""Factorizations and ranks as the caller states them: one for all layers, or by path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from fxfact.calibration import Statistics
from fxfact.conv import ConvSpec, Cost, Skip
from fxfact.errors import ArgumentError, check_int, error_context
from fxfact.factorizations import (
    Factorization,
    ParsedRank,
    Rank,
    parse_factorization,
    parse_rank_spec,
    resolve_rank,
)
from fxfact.planning.joint_sets import share_stages
from fxfact.planning.rank_rules import RankRule
from fxfact.planning.strategy import Allocation, ByPath, Candidate, Choice, RankStrategy

FactorizationRequest = str | Factorization | Sequence[str | Factorization]


@final
@dataclass(frozen=True)
class FixedRanks(RankStrategy):
    """For each layer the first listed factorization that applies, at the requested rank.

    A rank that is too large is lowered to the largest feasible one, with a note. If the exact path was given, this is a
    RankError instead.

    Attributes:
        factorizations: the factorizations to try, by path.
        ranks: the requested rank or rank rule, by path.
        statistics: calibration statistics, in whose metric the chains will be fitted.
        multiple: ranks are rounded down to a multiple of this unless they are full. A layer whose rank would become 0
            stays dense.
        partial: the candidates may be a part of the network, so a pattern may fit none of them.
    """

    factorizations: ByPath[tuple[Factorization, ...]]
    ranks: ByPath[ParsedRank | RankRule]
    statistics: Statistics | None = None
    multiple: int = 1
    partial: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "multiple", check_int("multiple_of", self.multiple, 1))

    @classmethod
    def parse(cls, factorization: object, rank: object, multiple: int | None = None) -> FixedRanks:
        """Parse the arguments of ``fxfact.factorize``. Raises ArgumentError, ArgumentTypeError, RankError."""
        factorizations, ranks = ByPath.parse(factorization, parse_factorizations), ByPath.parse(rank, _parse_rank)
        return cls(factorizations, ranks, multiple=1 if multiple is None else multiple)

    @property
    def uses_statistics(self) -> bool:
        """Whether there are statistics."""
        return self.statistics is not None

    def choose(self, candidates: Sequence[Candidate], network: Cost) -> Allocation:
        """Choose for each layer on its own. The layers of a joint set then share stages if their choices are equal."""
        paths = [candidate.path for candidate in candidates]
        if not self.partial:
            self.factorizations.check(paths, "factorization")
            self.ranks.check(paths, "rank")
        return Allocation(share_stages(candidates, [self._choose_one(candidate) for candidate in candidates]))

    def _choose_one(self, candidate: Candidate) -> Choice | Skip:
        factorizations, _ = self.factorizations.get(candidate.path)
        request, path_given = self.ranks.get(candidate.path)
        if factorizations is None or request is None:
            return Skip(f"no {'factorization' if factorizations is None else 'rank'} is given for it")
        refusals = []
        for factorization in factorizations:
            with error_context(candidate.path):
                rank = _resolve(factorization, candidate, request, clip=not path_given)
            if isinstance(rank, Skip):
                refusals.append(rank.reason)
                continue
            with error_context(candidate.path):
                factorization.layout(candidate.spec, rank)
            asked = (request,) * len(rank) if isinstance(request, int) else request
            lowered = isinstance(request, int | tuple) and asked != rank
            note = f"rank {request} lowered to what is feasible" if lowered else ""
            rounded = _round_down(factorization, candidate.spec, rank, self.multiple)
            if rounded is None:
                refusals.append(f"rank {rank} of {factorization.name} is below the first multiple of {self.multiple}")
                continue
            return Choice(factorization, rounded, note)
        return Skip("; ".join(dict.fromkeys(refusals)))


def parse_factorizations(request: object) -> tuple[Factorization, ...]:
    """Parse one factorization or a list of factorizations, each a name or an object."""
    if isinstance(request, Sequence) and not isinstance(request, str):
        if not request:
            raise ArgumentError("factorization: the list is empty. Name at least one.")
        return tuple(parse_factorization(one) for one in request)
    return (parse_factorization(request),)


def _parse_rank(request: object) -> ParsedRank | RankRule:
    return request if isinstance(request, RankRule) else parse_rank_spec(request)


def _resolve(
    factorization: Factorization, candidate: Candidate, request: ParsedRank | RankRule, *, clip: bool
) -> Rank | Skip:
    if not isinstance(request, RankRule):
        return resolve_rank(factorization, candidate.spec, request, clip=clip)
    answer: object = factorization.rejects(candidate.spec) or request.rank_for(factorization, candidate)
    if isinstance(answer, Skip):
        return answer
    name = type(request).__name__
    if answer is None or 0 in (answer if isinstance(answer, tuple | list) else (answer,)):
        return Skip(f"{name} finds no rank for {factorization.name}, it returned {answer}")
    with error_context(f"the rank that {name} returned"):
        return resolve_rank(factorization, candidate.spec, parse_rank_spec(answer), clip=False)


def _round_down(factorization: Factorization, spec: ConvSpec, rank: Rank, multiple: int) -> Rank | None:
    """Round each entry down to a multiple unless it is full. Returns None if an entry would become 0."""
    pairs = zip(rank, factorization.max_rank(spec), strict=True)
    rounded = tuple(r if r == full else r // multiple * multiple for r, full in pairs)
    return factorization.clip(spec, rounded) if all(rounded) else None
