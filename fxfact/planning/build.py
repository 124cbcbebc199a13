"""From a captured graph and a rank strategy to a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from fxfact.capture import Captured
from fxfact.conv import ConvSite, ConvSpec, Cost, Sizes, Skip, path_of
from fxfact.errors import ArgumentError, ArgumentTypeError
from fxfact.planning.decision import Decision
from fxfact.planning.plan import Plan
from fxfact.planning.strategy import Candidate, Choice, RankStrategy

Selection = str | Sequence[str] | Callable[[str, ConvSpec], bool]


def build_plan(
    captured: Captured,
    strategy: RankStrategy,
    *,
    include: Selection | None = None,
    exclude: Selection | None = None,
    allow_growth: bool = False,
    partial: bool = False,
) -> Plan:
    """Decide every convolution; ``include`` and ``exclude`` are globs on the path, or predicates on (path, spec), of
    what is captured or, where that is ``partial``, of more.
    """
    included, excluded = _predicate("include", include), _predicate("exclude", exclude)
    decisions = {path_of(item): _undecided(item, captured.samples) for item in captured.found}
    if not partial:
        _check_patterns(include, exclude, list(decisions))
    tied = [[d for d in decisions.values() if leader.path in (d.path, d.tied_to)] for leader in decisions.values()]
    together = [group for group in tied if group[0].spec is not None and not group[0].tied_to]
    layers = {site.path: site.layer for site in captured.sites}
    candidates: list[Candidate] = []
    chosen: list[list[Decision]] = []
    for group in together:
        if left_out := next((skip for d in group if (skip := _left_out(d, included, excluded))), None):
            decisions |= {d.path: _decided(d, left_out) for d in group}
        else:
            candidates.append(Candidate(group[0].path, layers[group[0].path], _calls(group)))
            chosen.append(group)
    network = _network(captured, decisions.values())
    answer = strategy.choose(candidates, network)
    for group, choice in zip(chosen, answer.choices, strict=True):
        decided = [_decided(d, choice) for d in group]
        if not allow_growth and (skip := _grows(decided)):
            decided = [_decided(d, skip) for d in group]
        decisions |= {d.path: d for d in decided}
    return Plan(
        model=captured.model,
        network=network,
        decisions=tuple(decisions.values()),
        capture=captured.frontend,
        compared=captured.compared,
        fold_weights=captured.fold_weights,
        leaf_modules=captured.leaf_modules,
        refused=captured.refused,
        uses_statistics=strategy.uses_statistics,
        pareto_points=answer.pareto_points,
    )


def _network(captured: Captured, decisions: Iterable[Decision]) -> Cost:
    """The whole network: its parameters, and the buffers that convolutions take as their weights. Of branches one alone
    was run, and all of them are counted.
    """
    tensors = [*captured.network.parameters(), *(t for site in captured.sites for t in (site.weight, site.bias))]
    params = sum({id(tensor): tensor.numel() for tensor in tensors if tensor is not None}.values())
    least = sum(decision.before.macs or 0 for decision in decisions if decision.spec is not None)
    return Cost(params, None if captured.macs is None else max(captured.macs, least))


def _calls(group: Sequence[Decision]) -> tuple[tuple[ConvSpec, tuple[Sizes, ...] | None], ...]:
    return tuple((decision.spec, decision.input_sizes) for decision in group if decision.spec is not None)


def _undecided(item: ConvSite | Skip, samples: int) -> Decision:
    if isinstance(item, Skip):
        return Decision(path=item.subject, spec=None, reason=item.reason)
    sizes = item.input_sizes(samples)
    return Decision(path=item.path, spec=item.spec, input_sizes=sizes, tied_to=item.tied_to)


def _decided(decision: Decision, choice: Choice | Skip) -> Decision:
    if isinstance(choice, Skip):
        return replace(decision, factorization=None, rank=None, reason=choice.reason, note="")
    decided = replace(decision, factorization=choice.factorization, rank=choice.rank, note=choice.note)
    if not decision.tied_to:
        decided = replace(
            decided, predicted_loss_increase=choice.predicted_loss_increase, milliseconds=choice.milliseconds
        )
    elif choice.milliseconds is not None:  # which are those of all that share the weight
        decided = replace(decided, milliseconds=(0.0, 0.0))
    if len(decided.stages) > 1:
        return decided
    return _decided(decision, Skip("at full rank the chain is the convolution itself"))


def _grows(together: Sequence[Decision]) -> Skip | None:
    before, after = (sum(costs, Cost(0, 0)) for costs in zip(*((d.before, d.after) for d in together), strict=True))
    if not after.exceeds(before):
        return None
    what = [("parameters", before.params, after.params), ("MACs", before.macs, after.macs)]
    grown = [
        f"{old:,} → {new:,} {name}" for name, old, new in what if old is not None and new is not None and new > old
    ]
    return Skip(f"it would grow: {', '.join(grown)}")


def _left_out(decision: Decision, included: _Predicate, excluded: _Predicate) -> Skip | None:
    assert decision.spec is not None
    owner = f" ({decision.path}, which shares its weight)" if decision.tied_to else ""
    if included is not None and not included(decision.path, decision.spec):
        return Skip(f"not included{owner}")
    if excluded is not None and excluded(decision.path, decision.spec):
        return Skip(f"excluded{owner}")
    return None


_Predicate = Callable[[str, ConvSpec], bool] | None


def _predicate(argument: str, selection: Selection | None) -> _Predicate:
    if selection is None:
        return None
    if callable(selection):
        predicate = selection

        def named(path: str, spec: ConvSpec) -> bool:
            try:
                return bool(predicate(path, spec))
            except Exception as error:
                raise ArgumentError(f"{argument}: the predicate failed on ({path!r}, {spec}): {error}") from error

        return named
    patterns = [selection] if isinstance(selection, str) else selection
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentTypeError(f"{argument} must be a glob, a list of globs or a predicate, got {selection!r}")
    return lambda path, spec: any(fnmatchcase(path, pattern) for pattern in patterns)


def _check_patterns(include: Selection | None, exclude: Selection | None, paths: Sequence[str]) -> None:
    """Raise ArgumentError for a glob that fits no convolution at all."""
    for argument, selection in (("include", include), ("exclude", exclude)):
        patterns = [] if selection is None or callable(selection) else selection
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if paths and not any(fnmatchcase(path, pattern) for path in paths):
                raise ArgumentError(f"{argument}: no convolution at {pattern!r}. There are: {', '.join(paths)}.")
