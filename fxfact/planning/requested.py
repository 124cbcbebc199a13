"""Ranks as the caller states them: one for all, or by path."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Generic, TypeVar, final

from fxfact.calibration import Statistics
from fxfact.conv import ConvSpec, Cost, Skip
from fxfact.errors import ArgumentError, check_int, error_context
from fxfact.factorizations import Factorization, ParsedRank, Rank, parse_factorization, parse_rank_spec, resolve_rank
from fxfact.planning.rank_rules import RankRule
from fxfact.planning.strategy import Allocation, Candidate, Choice, RankStrategy

T = TypeVar("T")
FactorizationRequest = str | Factorization | Sequence[str | Factorization]


@final
@dataclass(frozen=True)
class ByPath(Generic[T]):
    """A value for every path, or one by path or glob: the path itself first, then the globs in their order."""

    everywhere: T | None
    by_pattern: Mapping[str, T]

    @classmethod
    def parse(cls, request: object, parse: Callable[[object], T]) -> ByPath[T]:
        """``request`` is a value, or a mapping from path or glob to values, each understood by ``parse``."""
        if not isinstance(request, Mapping):
            return cls(parse(request), {})
        parsed = {}
        for pattern, value in request.items():
            with error_context(str(pattern)):
                parsed[str(pattern)] = parse(value)
        return cls(None, parsed)

    def get(self, path: str) -> tuple[T | None, bool]:
        """The value for a path (None: none is given), and whether the path itself was named."""
        if path in self.by_pattern:
            return self.by_pattern[path], True
        matching = (value for pattern, value in self.by_pattern.items() if fnmatchcase(path, pattern))
        return next(matching, self.everywhere), False

    def check(self, paths: Sequence[str], argument: str) -> None:
        """Raise ArgumentError for a pattern that fits no path."""
        for pattern in self.by_pattern:
            if not any(path == pattern or fnmatchcase(path, pattern) for path in paths):
                near = difflib.get_close_matches(pattern, paths, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ArgumentError(
                    f"{argument}: nothing to factorize at {pattern!r}.{hint} There are: {_some(paths)}."
                )


@final
@dataclass(frozen=True)
class FixedRanks(RankStrategy):
    """The first factorization listed for a convolution that takes it, at the rank asked for.

    A rank that is too large is lowered to what is feasible, with a note, unless its path was named: then RankError.
    Ranks are rounded down to multiples of ``multiple``, but for those that are full; where nothing is left of one, the
    convolution stays dense.
    """

    factorizations: ByPath[tuple[Factorization, ...]]
    ranks: ByPath[ParsedRank | RankRule]
    statistics: Statistics | None = None
    multiple: int = 1
    partial: bool = False  # whether the candidates may be some of those that paths are of

    def __post_init__(self) -> None:
        object.__setattr__(self, "multiple", check_int("multiple_of", self.multiple, 1))

    @classmethod
    def parse(cls, factorization: object, rank: object, multiple: int | None = None) -> FixedRanks:
        """From what ``fxfact.factorize`` takes. Raises ArgumentError, ArgumentTypeError, RankError."""
        methods, ranks = ByPath.parse(factorization, parse_factorizations), ByPath.parse(rank, _parse_rank)
        return cls(methods, ranks, multiple=1 if multiple is None else multiple)

    @property
    def uses_statistics(self) -> bool:
        """With statistics, in whose metric the chains are then decomposed."""
        return self.statistics is not None

    def choose(self, candidates: Sequence[Candidate], network: Cost) -> Allocation:
        """One by one: nothing is traded between convolutions."""
        paths = [candidate.path for candidate in candidates]
        if not self.partial:
            self.factorizations.check(paths, "factorization")
            self.ranks.check(paths, "rank")
        return Allocation(tuple(self._choose(candidate) for candidate in candidates))

    def _choose(self, candidate: Candidate) -> Choice | Skip:
        methods, _ = self.factorizations.get(candidate.path)
        request, named = self.ranks.get(candidate.path)
        if methods is None or request is None:
            return Skip(f"no {'factorization' if methods is None else 'rank'} is given for it")
        refusals = []
        for method in methods:
            with error_context(candidate.path):
                rank = _resolved(method, candidate, request, clip=not named)
            if isinstance(rank, Skip):
                refusals.append(rank.reason)
                continue
            with error_context(candidate.path):
                method.layout(candidate.spec, rank)
            asked = (request,) * len(rank) if isinstance(request, int) else request
            lowered = isinstance(request, int | tuple) and asked != rank
            note = f"rank {request} lowered to what is feasible" if lowered else ""
            rounded = _rounded(method, candidate.spec, rank, self.multiple)
            if rounded is None:
                refusals.append(f"rank {rank} of {method.name} is below the first multiple of {self.multiple}")
                continue
            return Choice(method, rounded, note)
        return Skip("; ".join(dict.fromkeys(refusals)))


def parse_factorizations(request: object) -> tuple[Factorization, ...]:
    """One factorization, or a list of them, by name or as objects."""
    if isinstance(request, Sequence) and not isinstance(request, str):
        if not request:
            raise ArgumentError("factorization: the list is empty. Name at least one.")
        return tuple(parse_factorization(one) for one in request)
    return (parse_factorization(request),)


def _parse_rank(request: object) -> ParsedRank | RankRule:
    return request if isinstance(request, RankRule) else parse_rank_spec(request)


def _resolved(
    method: Factorization, candidate: Candidate, request: ParsedRank | RankRule, *, clip: bool
) -> Rank | Skip:
    if not isinstance(request, RankRule):
        return resolve_rank(method, candidate.spec, request, clip=clip)
    return method.rejects(candidate.spec) or request.rank_for(method, candidate)


def _rounded(method: Factorization, spec: ConvSpec, rank: Rank, multiple: int) -> Rank | None:
    """Down to multiples of a number, None where that is nothing; what is full stays."""
    pairs = zip(rank, method.max_rank(spec), strict=True)
    rounded = tuple(r if r == most else r // multiple * multiple for r, most in pairs)
    return method.clip(spec, rounded) if all(rounded) else None


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "") if paths else "none at all"
