"""From a captured network to a plan: which layers are candidates, and the plan for an allocation of ranks to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from fxfact.capture import Captured
from fxfact.conv import ConvSite, ConvSpec, Cost, Skip, path_of
from fxfact.errors import AccuracyWarning, ArgumentError, ArgumentTypeError
from fxfact.planning.budgets import Budget
from fxfact.planning.decision import Decision, summarize_reasons, unreached_cost
from fxfact.planning.joint_sets import Joint, parse_joint, with_joint_sets
from fxfact.planning.plan import Plan
from fxfact.planning.strategy import Allocation, Candidate, Choice, RankStrategy
from fxfact.utils import warn_caller

Selection = str | Sequence[str] | Callable[[str, ConvSpec], bool]
Kinds = str | Sequence[str]
KINDS = ("conv", "linear")
_Predicate = Callable[[str, ConvSpec], bool]


@dataclass(frozen=True, kw_only=True)
class SearchScope:
    """Which layers of a network a plan may change.

    Attributes:
        include: globs on the path, or a predicate on (path, spec). None includes every layer.
        exclude: the same, for layers to leave alone.
        kinds: the kinds of layers that may change: 'conv', 'linear' or both.
        joint: globs on the path, each for a set of layers that may share stages.
        allow_growth: also rewrite layers that would have more parameters or MACs.
        partial: the captured network is a part of a larger one, so a glob may fit nothing.
        call: what ``Plan.call`` is to be.
    """

    include: Selection | None = None
    exclude: Selection | None = None
    kinds: Kinds = KINDS
    joint: Joint = ()
    allow_growth: bool = False
    partial: bool = False
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = (self.kinds,) if isinstance(self.kinds, str) else self.kinds
        if not isinstance(kinds, Sequence) or not kinds or not {*kinds} <= {*KINDS}:
            raise ArgumentError(f"kinds must be 'conv', 'linear' or a list of these, got {self.kinds!r}")
        object.__setattr__(self, "kinds", tuple(kinds))
        object.__setattr__(self, "joint", parse_joint(self.joint))


@dataclass(frozen=True, eq=False)
class PlanDraft:
    """A plan before ranks are chosen.

    Attributes:
        captured: the network.
        scope: which layers may change.
        decisions: one for every layer, in the order of the graph. Layers that may not change have their reason.
        groups: for every candidate the paths of the layers that share its weight, its own path first.
        candidates: the layers to choose for.
        network: the cost of the whole dense network.
    """

    captured: Captured
    scope: SearchScope
    decisions: tuple[Decision, ...]
    groups: tuple[tuple[str, ...], ...]
    candidates: tuple[Candidate, ...]
    network: Cost

    def check_reach(self, budget: Budget) -> None:
        """Raise BudgetError if what no factorization can reach costs more than the budget."""
        least, allowed = budget.amount(unreached_cost(self.network, self.decisions)), budget.allowed(self.network)
        if least > allowed:
            raise budget.out_of_reach_error(least, self.network, self.why_unread)

    @property
    def why_unread(self) -> str:
        """The most frequent reasons of layers that could not be read."""
        return summarize_reasons(decision for decision in self.decisions if decision.spec is None)

    def dense_plan(self, reason: str = "") -> Plan:
        """Return the plan without rewrites, with a reason for the candidates."""
        choices = (Skip(reason),) * len(self.candidates)
        return self.to_plan(Allocation(choices), uses_statistics=False)

    def to_plan(self, allocation: Allocation, *, uses_statistics: bool) -> Plan:
        """Return the plan for one choice for each candidate."""
        decisions = {decision.path: decision for decision in self.decisions}
        others = allocation.alternatives or [()] * len(self.groups)
        for group, choice, alternatives in zip(self.groups, allocation.choices, others, strict=True):
            decided = [_decide(decisions[path], choice) for path in group]
            decided[0] = replace(decided[0], alternatives=alternatives)
            decisions |= {decision.path: decision for decision in decided}
        if not self.scope.allow_growth:
            decisions = _without_growth(decisions.values())
        return Plan(
            model=self.captured.model,
            network=self.network,
            decisions=tuple(decisions.values()),
            capture=self.captured.frontend,
            compared=self.captured.compared,
            fold_weights=self.captured.fold_weights,
            leaf_modules=self.captured.leaf_modules,
            refused=self.captured.refused,
            uses_statistics=uses_statistics,
            pareto_points=allocation.pareto_points,
            call=self.scope.call,
        )


def draft_plan(captured: Captured, scope: SearchScope) -> PlanDraft:
    """Find the candidates of a captured network.

    Raises:
        ArgumentError: for a glob that fits no layer, a predicate that fails, and a joint set that cannot share stages.
        ArgumentTypeError: for a selection of another type.
    """
    included, excluded = _parse_selection("include", scope.include), _parse_selection("exclude", scope.exclude)
    decisions = {path_of(item): _undecided(item, captured.samples) for item in captured.found}
    if not scope.partial:
        _check_patterns("include", scope.include, list(decisions))
        _check_patterns("exclude", scope.exclude, list(decisions))
    layers = {site.path: site.layer for site in captured.sites}
    groups: list[tuple[str, ...]] = []
    candidates: list[Candidate] = []
    for leader in list(decisions.values()):
        if leader.spec is None or leader.tied_to:
            continue
        group = [decision for decision in decisions.values() if leader.path in (decision.path, decision.tied_to)]
        reasons = (_why_left_out(decision, included, excluded, scope, captured.adapters) for decision in group)
        if left_out := next((reason for reason in reasons if reason), None):
            decisions |= {decision.path: _decide(decision, left_out) for decision in group}
            continue
        calls = tuple((decision.spec, decision.input_sizes) for decision in group if decision.spec is not None)
        groups.append(tuple(decision.path for decision in group))
        candidates.append(Candidate(leader.path, layers[leader.path], calls))
    network = _network_cost(captured, decisions.values())
    joint = with_joint_sets(parse_joint(scope.joint), list(decisions.values()), candidates)
    return PlanDraft(captured, scope, tuple(decisions.values()), tuple(groups), joint, network)


def build_plan(captured: Captured, strategy: RankStrategy, scope: SearchScope) -> Plan:
    """Return the plan of a strategy for a captured network. Raises what ``draft_plan`` and the strategy raise."""
    draft = draft_plan(captured, scope)
    allocation = strategy.choose(draft.candidates, draft.network)
    return draft.to_plan(allocation, uses_statistics=strategy.uses_statistics)


def warn_without_data(
    plan: Plan,
    caller: str,
    advice: str = (
        "Pass calibration=batches, a few hundred inputs without labels, and a budget such as fxfact.Macs(0.5). If you "
        "train the network anyway, ignore this (fxfact.AccuracyWarning)."
    ),
) -> None:
    """Warn, as ``caller``, if a plan rewrites layers without knowing what this does to the outputs."""
    if plan.rewrites and not plan.uses_statistics:
        warn_caller(
            f"{caller} chose ranks without data, so it cannot know how far the accuracy of {plan.model} drops, and it "
            f"often drops far. {advice}",
            AccuracyWarning,
        )


def _network_cost(captured: Captured, decisions: Iterable[Decision]) -> Cost:
    """Return the cost of the whole network. Buffers that convolutions use as weights count as parameters.

    Of the branches of a conditional only one was run, but all of them count.
    """
    tensors = [*captured.network.parameters(), *(t for site in captured.sites for t in (site.weight, site.bias))]
    params = sum({id(tensor): tensor.numel() for tensor in tensors if tensor is not None}.values())
    conv_macs = sum(decision.before.macs or 0 for decision in decisions if decision.spec is not None)
    return Cost(params, None if captured.macs is None else max(captured.macs, conv_macs))


def _undecided(item: ConvSite | Skip, samples: int) -> Decision:
    if isinstance(item, Skip):
        return Decision(path=item.subject, spec=None, reason=item.reason)
    sizes = item.input_sizes(samples)
    return Decision(path=item.path, spec=item.spec, input_sizes=sizes, tied_to=item.tied_to)


def _decide(decision: Decision, choice: Choice | Skip) -> Decision:
    if isinstance(choice, Skip):
        return replace(decision, factorization=None, rank=None, shares_with=None, reason=choice.reason, note="")
    method, shares_with = choice.factorization, choice.shares_with
    decided = replace(decision, factorization=method, rank=choice.rank, shares_with=shares_with, note=choice.note)
    if not decision.tied_to:
        increase, latencies = choice.predicted_loss_increase, choice.latencies_ms
        decided = replace(decided, predicted_loss_increase=increase, latencies_ms=latencies)
    elif choice.latencies_ms is not None:  # the first layer's latencies are those of all layers that share the weight
        decided = replace(decided, latencies_ms=(0.0, 0.0))
    if len(decided.stages) > 1:
        return decided
    return _decide(decision, Skip("at full rank the chain is the convolution itself"))


def _without_growth(decisions: Iterable[Decision]) -> dict[str, Decision]:
    """Return decisions by path. Layers that share a weight or stages, and would grow together, stay dense."""
    groups: dict[str, list[Decision]] = {}
    for decision in decisions:
        groups.setdefault(decision.shares_with or decision.tied_to or decision.path, []).append(decision)
    grown = {each.path: skip for group in groups.values() if (skip := _why_larger(group)) for each in group}
    return {each.path: _decide(each, grown[each.path]) if each.path in grown else each for each in decisions}


def _why_larger(group: Sequence[Decision]) -> Skip | None:
    before, after = (sum(costs, Cost(0, 0)) for costs in zip(*((d.before, d.after) for d in group), strict=True))
    if not after.exceeds(before):
        return None
    amounts = [("parameters", before.params, after.params), ("MACs", before.macs, after.macs)]
    grown = [
        f"{old:,} → {new:,} {name}" for name, old, new in amounts if old is not None and new is not None and new > old
    ]
    return Skip(f"it would grow: {', '.join(grown)}")


def _why_left_out(
    decision: Decision,
    included: _Predicate | None,
    excluded: _Predicate | None,
    scope: SearchScope,
    adapters: Mapping[str, str],
) -> Skip | None:
    assert decision.spec is not None
    if decision.spec.kind not in scope.kinds:
        return Skip(f"kinds={', '.join(scope.kinds)} leaves it out")
    owner = f" ({decision.path}, which shares its weight)" if decision.tied_to else ""
    if included is not None and not included(decision.path, decision.spec):
        return Skip(f"not included{owner}")
    if excluded is not None and excluded(decision.path, decision.spec):
        return Skip(f"excluded{owner}")
    if included is None and (adapter := adapters.get(decision.path)):
        return Skip(f"it belongs to {adapter}: merge the adapter first, or name the layer in include={owner}")
    return None


def _parse_selection(argument: str, selection: Selection | None) -> _Predicate | None:
    if selection is None:
        return None
    if callable(selection):
        predicate = selection

        def checked_predicate(path: str, spec: ConvSpec) -> bool:
            try:
                return bool(predicate(path, spec))
            except Exception as error:
                raise ArgumentError(f"{argument}: the predicate failed on ({path!r}, {spec}): {error}") from error

        return checked_predicate
    patterns = [selection] if isinstance(selection, str) else selection
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentTypeError(f"{argument} must be a glob, a list of globs or a predicate, got {selection!r}")
    return lambda path, spec: any(fnmatchcase(path, pattern) for pattern in patterns)


def _check_patterns(argument: str, selection: Selection | None, paths: Sequence[str]) -> None:
    """Raise ArgumentError for a glob that fits no convolution."""
    patterns = [] if selection is None or callable(selection) else selection
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if paths and not any(fnmatchcase(path, pattern) for path in paths):
            raise ArgumentError(f"{argument}: no layer at {pattern!r}. There are: {', '.join(paths)}.")
