"""What could become of the layers of a joint set together: chains of one factorization and rank that share stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import islice

from fxfact.calibration import Statistics
from fxfact.conv import Cost
from fxfact.factorizations import Factorization, Rank
from fxfact.planning.error_curves import ErrorCurveCache, cache_key, interpolate, joint_error_curves
from fxfact.planning.hardware_ranks import multiples
from fxfact.planning.joint_sets import members_by_set
from fxfact.planning.layer_options import LayerOptions, Option, thinned
from fxfact.planning.strategy import Candidate, Choice
from fxfact.utils import Progress, ordered_map, with_progress


@dataclass(frozen=True, eq=False)
class JointFamily:
    """One factorization of a joint set.

    Attributes:
        members: the layers, first one first.
        factorization: the factorization.
        costs: the ranks to choose from, ascending, with the cost of every layer's chain. The first layer counts the
            parameters that all share.
    """

    members: tuple[Candidate, ...]
    factorization: Factorization
    costs: Mapping[Rank, tuple[Cost, ...]]

    def smallest(self, count: int) -> JointFamily:
        """Return the family with its smallest ranks alone."""
        return replace(self, costs=dict(islice(self.costs.items(), count)))


def joint_families(
    candidates: Sequence[Candidate], factorizations_of: Callable[[str], Sequence[Factorization]], multiple: int
) -> list[JointFamily]:
    """Return the factorizations with which the layers of joint sets could share stages.

    Args:
        candidates: the layers that may be rewritten.
        factorizations_of: returns the factorizations to consider for a path.
        multiple: ranks are multiples of this, or full.
    """
    families: list[JointFamily] = []
    for indices in members_by_set(candidates).values():
        members = [candidates[k] for k in indices]
        first, *others = (factorizations_of(member.path) for member in members)
        if others:
            families += _families_of(members, [f for f in first if all(f in own for own in others)], multiple)
    return families


def _families_of(
    members: Sequence[Candidate], factorizations: Sequence[Factorization], multiple: int
) -> Iterator[JointFamily]:
    """Yield the factorizations whose chains share stages, at the ranks at which the set costs no more than before."""
    spec, dense = members[0].spec, _total([member.dense_cost for member in members])
    for factorization in factorizations:
        if factorization.rejects(spec):
            continue
        sharing = [rank for rank in factorization.ranks(spec) if factorization.shared_stages(spec, rank)]
        ranks = multiples(sharing, multiple, factorization.max_rank(spec))
        costs = {rank: _costs(members, factorization, rank) for rank in ranks}
        affordable = thinned([rank for rank, own in costs.items() if not _total(own).exceeds(dense)])
        if affordable:
            yield JointFamily(tuple(members), factorization, {rank: costs[rank] for rank in affordable})


def _costs(members: Sequence[Candidate], factorization: Factorization, rank: Rank) -> tuple[Cost, ...]:
    shared = factorization.shared_params(members[0].spec, rank)
    first, *others = (member.cost(factorization, rank) for member in members)
    return (first, *(replace(cost, params=cost.params - shared) for cost in others))


def _total(costs: Sequence[Cost]) -> Cost:
    return sum(costs[1:], costs[0])


def joint_errors(
    families: Sequence[JointFamily],
    statistics: Statistics | None,
    known: ErrorCurveCache,
    *,
    executor: Executor | None,
    progress: Progress,
) -> list[list[list[float]]]:
    """Return for each family the loss increase of every layer at every rank, or without statistics the squared error.

    Curves that are not known yet are computed, one job for each family, and added to ``known``.
    """
    keys = [_keys(family, statistics) for family in families]
    missing = [k for k, own in enumerate(keys) if any(key not in known for key in own)]
    jobs = (
        (
            [member.layer for member in family.members],
            family.factorization,
            list(family.costs),
            [None if statistics is None else statistics.fisher(m.path, m.spec) for m in family.members],
        )
        for family in (families[k] for k in missing)
    )
    results = with_progress(ordered_map(joint_error_curves, jobs, executor), len(missing), "planning", progress)
    for k, curves in zip(missing, results, strict=True):
        for key, curve in zip(keys[k], curves, strict=True):
            known[key] = curve
    pairs = zip(families, keys, strict=True)
    return [[interpolate(known[key], list(family.costs)) for key in own] for family, own in pairs]


def _keys(family: JointFamily, statistics: Statistics | None) -> list[str]:
    """Return the cache key of every layer's error curve. It names all layers of the set."""
    digests = [
        (each.weight_digest(), "no statistics" if statistics is None else statistics.digest(each.path))
        for each in family.members
    ]
    together = " ".join(f"{weight} {digest}" for weight, digest in digests)
    ranks, pairs = list(family.costs), zip(family.members, digests, strict=True)
    own = (cache_key(family.factorization, each.spec, ranks, *digest) for each, digest in pairs)
    return [f"{key} of joint {together}" for key in own]


def with_joint_options(
    layers: Sequence[LayerOptions],
    candidates: Sequence[Candidate],
    families: Sequence[tuple[JointFamily, Sequence[Sequence[float]]]],
    *,
    in_nats: bool,
) -> tuple[LayerOptions, ...]:
    """Return the options of all layers, with those of their joint sets.

    Args:
        layers: the options of every candidate alone.
        candidates: the candidates.
        families: each with the loss increase of every layer at every rank.
        in_nats: whether the increases are in nats.
    """
    found = {candidate.path: layer for candidate, layer in zip(candidates, layers, strict=True)}
    for family, increases in families:
        leader = family.members[0].path
        for k, (member, own) in enumerate(zip(family.members, increases, strict=True)):
            options = tuple(
                Option(
                    Choice(
                        family.factorization,
                        rank,
                        predicted_loss_increase=increase if in_nats else None,
                        shares_with=leader,
                    ),
                    costs[k],
                    increase,
                )
                for (rank, costs), increase in zip(family.costs.items(), own, strict=True)
            )
            layer = found[member.path]
            found[member.path] = replace(layer, joint=(*layer.joint, *options))
    return tuple(found[candidate.path] for candidate in candidates)
