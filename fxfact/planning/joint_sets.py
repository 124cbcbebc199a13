"""Joint sets: layers of one shape whose chains share stages. The caller names them by globs on paths."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from fxfact.conv import Skip
from fxfact.errors import ArgumentError, ArgumentTypeError, PlanError
from fxfact.planning.decision import Decision
from fxfact.planning.strategy import Candidate, Choice

Joint = str | Collection[str]


def parse_joint(request: object) -> tuple[str, ...]:
    """Return the globs, each of which names a set. Raises ArgumentTypeError."""
    globs = (request,) if isinstance(request, str) else request
    if not isinstance(globs, Collection) or isinstance(globs, Mapping) or not all(isinstance(g, str) for g in globs):
        raise ArgumentTypeError(f"joint must be a glob on paths or a list of globs, got {request!r}")
    return tuple(sorted(globs) if isinstance(globs, set | frozenset) else globs)


def with_joint_sets(
    globs: Sequence[str], decisions: Sequence[Decision], candidates: Sequence[Candidate]
) -> tuple[Candidate, ...]:
    """Return the candidates with the path of the first layer of their joint set.

    Args:
        globs: one for each set.
        decisions: one for every layer, with the reasons of those that may not be rewritten.
        candidates: the layers that may be rewritten.

    Raises:
        ArgumentError: for a set that cannot share stages. The message names two of its layers.
    """
    leaders: dict[str, tuple[str, str]] = {}  # by path, the first layer of the set and its glob
    by_path = {candidate.path: candidate for candidate in candidates}
    for glob in dict.fromkeys(globs):
        fitting = [decision for decision in decisions if fnmatchcase(decision.path, glob)]
        paths = dict.fromkeys(decision.tied_to or decision.path for decision in fitting)
        members = [by_path[path] for path in paths if path in by_path]
        _check_alike(glob, members)
        _check_count(glob, members, fitting, decisions)
        for member in members:
            if member.path in leaders:
                raise ArgumentError(
                    f"joint: {member.path} fits {leaders[member.path][1]!r} and {glob!r}. A layer belongs to one set: "
                    "narrow one of the globs."
                )
            leaders[member.path] = members[0].path, glob
    return tuple(replace(each, joint_set=leaders.get(each.path, (None,))[0]) for each in candidates)


def _check_count(
    glob: str, members: Sequence[Candidate], fitting: Sequence[Decision], decisions: Sequence[Decision]
) -> None:
    if len(members) > 1:
        return
    left_out = [f"{each.path} stays dense: {each.reason}" for each in fitting if each.reason]
    found = [f"{members[0].path} fits alone"] if members else []
    listed = "; ".join([*found, *left_out]) or f"There are: {', '.join(each.path for each in decisions)}"
    raise ArgumentError(
        f"joint: {glob!r} fits {'one layer' if members else 'no layer'} that may be rewritten, and a joint set needs "
        f"two. {listed}."
    )


def _check_alike(glob: str, members: Sequence[Candidate]) -> None:
    for member in members:
        if len(member.calls) > 1:
            raise ArgumentError(
                f"joint: {glob!r} fits layers that hold the whole weight of {member.path}. Leave them out of the set."
            )
        if member.spec.groups > 1 or (member.spec.transposed and member.spec.order):
            raise ArgumentError(
                f"joint: {glob!r} fits {member.path}, {member.spec}. Layers with groups and transposed ones share no "
                "stages. Leave it out of the set."
            )
        if _kind(member) != _kind(members[0]):
            raise ArgumentError(
                f"joint: {glob!r} fits {members[0].path} with a weight {_kind(members[0])} and {member.path} with a "
                f"weight {_kind(member)}. Name one set for each kind: layers that share stages have weights of one "
                "shape, dtype and device."
            )


def _kind(candidate: Candidate) -> str:
    weight = candidate.layer.weight
    return f"{tuple(weight.shape)} in {str(weight.dtype).removeprefix('torch.')} on {weight.device}"


def members_by_set(candidates: Sequence[Candidate]) -> dict[str, list[int]]:
    """Return the indices of the candidates of each joint set, by the path of its first layer."""
    sets: dict[str, list[int]] = {}
    for index, candidate in enumerate(candidates):
        if candidate.joint_set is not None:
            sets.setdefault(candidate.joint_set, []).append(index)
    return sets


def share_stages(candidates: Sequence[Candidate], choices: Sequence[Choice | Skip]) -> tuple[Choice | Skip, ...]:
    """Return the choices, of which those of a joint set share stages if they can. Otherwise a note says why not."""
    found = list(choices)
    for indices in members_by_set(candidates).values():
        chosen = {k: choice for k in indices if isinstance(choice := choices[k], Choice)}
        if not chosen:
            continue
        leader = candidates[next(iter(chosen))]
        why_not = _why_separate([candidates[k] for k in chosen], list(chosen.values()))
        for k, choice in chosen.items():
            note = "; ".join(filter(None, (choice.note, why_not and f"not joint: {why_not}")))
            found[k] = replace(choice, note=note, shares_with=None if why_not else leader.path)
    return tuple(found)


def _why_separate(members: Sequence[Candidate], choices: Sequence[Choice]) -> str:
    first = choices[0]
    if len(choices) < 2:
        return "the other layers of the set stay dense"
    for member, choice in zip(members, choices, strict=True):
        if (choice.factorization, choice.rank) != (first.factorization, first.rank):
            return (
                f"{member.path} gets {choice.factorization.name} of rank {choice.rank}, and {members[0].path} "
                f"{first.factorization.name} of rank {first.rank}"
            )
    if not first.factorization.shared_stages(members[0].spec, first.rank):
        return f"{first.factorization.name} of this rank has no stages to share"
    return ""


def check_shared(decisions: Sequence[Decision]) -> None:
    """Raise PlanError unless the layers of every joint set can hold the same stages."""
    by_path = {decision.path: decision for decision in decisions}
    for decision in decisions:
        if decision.shares_with is None:
            continue
        first = by_path.get(decision.shares_with)
        if first is None or first.shares_with != first.path or _shared_weights(first) != _shared_weights(decision):
            raise PlanError(
                f"{decision.path} cannot share stages with {decision.shares_with}: the layers of a joint set need one "
                "factorization and rank, and kernels of one shape"
            )


def _shared_weights(decision: Decision) -> tuple[object, ...]:
    """Return what must be equal for layers that hold the same stages."""
    shapes = {k: decision.stages[k].weight_shape for k in decision.shared_stages}
    return decision.factorization, decision.rank, decision.spec and decision.spec.weight_shape, shapes
