"""From a captured graph and a rank strategy to a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from fxfact.conv import ConvSpec
from fxfact.cost import Cost
from fxfact.errors import ArgumentTypeError
from fxfact.graph import Captured, ConvSite, match
from fxfact.planning.base import Decision, Plan
from fxfact.ranks import Candidate, Choice, RankStrategy
from fxfact.skip import Skip

Selection = str | Sequence[str] | Callable[[str, ConvSpec], bool]


def make_plan(
    captured: Captured,
    model: str,
    strategy: RankStrategy,
    *,
    include: Selection | None = None,
    exclude: Selection | None = None,
    allow_growth: bool = False,
) -> Plan:
    """Decide every convolution; ``include`` and ``exclude`` are globs on the path, or predicates on (path, spec)."""
    included, excluded = _predicate("include", include), _predicate("exclude", exclude)
    found = match(captured.graph_module).found
    decisions = {_path(item): _undecided(item, captured.samples) for item in (*found, *captured.unreached)}
    leaders = [d for d in decisions.values() if d.spec is not None and not d.tied_to]
    candidates = [Candidate(d.path, d.spec, d.input_sizes) for d in leaders if d.spec is not None]
    for decision, choice in zip(leaders, strategy.choose(candidates), strict=True):
        followers = [d for d in decisions.values() if d.tied_to == decision.path]
        together = [decision, *followers]
        left_out = next((skip for d in together if (skip := _left_out(d, included, excluded))), None)
        for one in together:
            decisions[one.path] = _decided(one, left_out or choice)
        if not allow_growth and (skip := _grows([decisions[d.path] for d in together])):
            decisions |= {d.path: _decided(d, skip) for d in together}
    params = sum({id(p): p.numel() for p in captured.graph_module.parameters()}.values())
    return Plan(model=model, network=Cost(params, captured.macs), decisions=tuple(decisions.values()))


def _path(item: ConvSite | Skip) -> str:
    return item.path if isinstance(item, ConvSite) else item.subject


def _undecided(item: ConvSite | Skip, samples: int) -> Decision:
    if isinstance(item, Skip):
        return Decision(path=item.subject, spec=None, reason=item.reason)
    sizes = item.input_sizes(samples)
    return Decision(path=item.path, spec=item.layer.spec, input_sizes=sizes, tied_to=item.tied_to)


def _decided(decision: Decision, choice: Choice | Skip) -> Decision:
    if isinstance(choice, Skip):
        return replace(decision, factorization=None, rank=None, reason=choice.reason, note="")
    decided = replace(decision, factorization=choice.factorization, rank=choice.rank, note=choice.note)
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
    if selection is None or callable(selection):
        return selection
    patterns = [selection] if isinstance(selection, str) else selection
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentTypeError(f"{argument} must be a glob, a list of globs or a predicate, got {selection!r}")
    return lambda path, spec: any(fnmatchcase(path, pattern) for pattern in patterns)
