"""The decision for one convolution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fxfact.conv import ConvSpec, Cost, Sizes, as_tuples, chain_cost
from fxfact.errors import PlanError
from fxfact.factorizations import Factorization, Rank
from fxfact.planning.strategy import Alternative, significant

_TUPLES = ("input_sizes", "rank", "latencies_ms")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision for one convolution: a factorization and a rank, or the reason why it stays dense.

    Attributes:
        path: the path of the convolution in the model.
        spec: the convolution, or None if it could not be parsed.
        input_sizes: the spatial size of the input at every call. None if no example inputs were given.
        tied_to: the path of the convolution that holds the same weight and counts its parameters, if there is one.
        factorization: the factorization, or None if the convolution stays dense.
        rank: the rank, or None if the convolution stays dense.
        shares_with: the path of the first layer of a joint set, this one or another, if the chains of its layers share
            stages. The first layer counts their parameters.
        reason: why the convolution stays dense.
        note: how the decision differs from the request, if it does.
        predicted_loss_increase: the expected increase of the loss in nats for one sample. None without data.
        latencies_ms: milliseconds of the convolution and of its chain in one call of the network, if measured.
        alternatives: what could have become of the convolution, this decision among it, if a budget chose; least loss
            increase first (see ``fxfact.explain``).

    Raises:
        PlanError: if the factorization is given without a rank or a convolution, or the other way round.
    """

    path: str
    spec: ConvSpec | None
    input_sizes: tuple[Sizes, ...] | None = None
    tied_to: str | None = None
    factorization: Factorization | None = None
    rank: Rank | None = None
    shares_with: str | None = None
    reason: str = ""
    note: str = ""
    predicted_loss_increase: float | None = None
    latencies_ms: tuple[float, float] | None = None
    alternatives: tuple[Alternative, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "predicted_loss_increase", significant(self.predicted_loss_increase))
        if (self.factorization is None) != (self.rank is None) or (self.rank is not None and self.spec is None):
            raise PlanError(f"{self.path}: a rewrite needs a convolution, a factorization and a rank, got {self.rank}")
        if self.shares_with is not None and not self.shared_stages:
            raise PlanError(f"{self.path}: there are no stages to share with {self.shares_with}")

    @property
    def rewrite(self) -> str:
        """Identifies the rewrite: path, factorization, rank and joint set. Equal for decisions that do the same."""
        return f"{self.path} {self.factorization} {self.rank} {self.shares_with or ''}".rstrip()

    @property
    def stages(self) -> tuple[ConvSpec, ...]:
        """The convolutions that the network will have here: those of the chain, or the dense one."""
        if self.spec is None:
            return ()
        if self.factorization is None or self.rank is None:
            return (self.spec,)
        return self.factorization.layout(self.spec, self.rank)

    @property
    def shared_stages(self) -> tuple[int, ...]:
        """The indices of the stages that the layers of its joint set share; empty without one."""
        if self.shares_with is None or self.spec is None or self.factorization is None or self.rank is None:
            return ()
        return self.factorization.shared_stages(self.spec, self.rank)

    @property
    def remark(self) -> str:
        """What is to say about the layer: what it shares with others, and its note or reason."""
        count = len(self.shared_stages)
        stages = f"{count} stage{'s' if count > 1 else ''}"
        shared = f"shares {stages} with {self.shares_with}" if count else ""
        if self.shares_with == self.path:
            shared = f"its joint set shares {stages}"
        tied = f"shares the weight of {self.tied_to}" if self.tied_to else ""
        return "; ".join(filter(None, (tied, shared, self.note or self.reason)))

    @property
    def before(self) -> Cost:
        """The cost of the convolution as it is."""
        dense_ms, _ = self.latencies_ms or (None, None)
        return replace(self._cost_of((self.spec,) if self.spec else ()), ms=dense_ms)

    @property
    def after(self) -> Cost:
        """The cost of the convolution after the plan is applied: of its chain, or as it is."""
        _, chain_ms = self.latencies_ms or (None, None)
        cost = replace(self._cost_of(self.stages), ms=chain_ms)
        if self.shares_with in (None, self.path) or self.spec is None or not self.factorization or not self.rank:
            return cost
        return replace(cost, params=cost.params - self.factorization.shared_params(self.spec, self.rank))

    def _cost_of(self, stages: Sequence[ConvSpec]) -> Cost:
        return chain_cost(stages, self.input_sizes, tied=self.tied_to is not None)


def unreached_cost(network: Cost, decisions: Iterable[Decision]) -> Cost:
    """Return the cost of a network without the layers that factorizations could replace."""
    for decision in decisions:
        if decision.spec is not None:
            network = network - decision.before
    return replace(network, ms=None)


def summarize_reasons(decisions: Iterable[Decision], most: int = 3) -> str:
    """Return the most frequent reasons of decisions, with their counts. Details after a colon do not count."""
    reasons = [decision.reason for decision in decisions]
    examples = {reason.partition(":")[0]: reason for reason in reversed(reasons)}
    counts = Counter(reason.partition(":")[0] for reason in reasons)
    texts = [f"{count}× {examples[kind]}" for kind, count in counts.most_common(most)]
    return "; ".join([*texts, *([f"and {len(counts) - most} other reasons"] if len(counts) > most else [])])


def decision_to_json(decision: Decision) -> dict[str, Any]:
    """Return a decision as plain data, without fields that have their default."""
    data = fields_to_json(decision)
    data["spec"] = fields_to_json(decision.spec) if decision.spec else None
    if decision.factorization is not None:
        data["factorization"] = _factorization_to_json(decision.factorization)
    if decision.alternatives:
        data["alternatives"] = [
            {
                **fields_to_json(other),
                "factorization": _factorization_to_json(other.factorization),
                "cost": fields_to_json(other.cost),
            }
            for other in decision.alternatives
        ]
    return data


def _factorization_to_json(factorization: Factorization) -> dict[str, Any]:
    options = {field.name: getattr(factorization, field.name) for field in fields(factorization)}
    return {"name": factorization.name, "options": options}


def fields_to_json(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that do not have their default, by name."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {field.name: values[field.name] for field in fields(record) if values[field.name] != field.default}


def decision_from_json(data: Mapping[str, Any], known: Mapping[str, type[Factorization]]) -> Decision:
    """Return a decision from plain data. ``known`` has the factorizations by name. Raises PlanError."""
    values = {key: as_tuples(value) if key in _TUPLES else value for key, value in data.items()}
    if values["spec"] is not None:
        values["spec"] = ConvSpec.from_json(values["spec"])
    if values.get("factorization") is not None:
        values["factorization"] = _factorization_from_json(values["factorization"], known)
    values["alternatives"] = tuple(_alternative_from_json(other, known) for other in data.get("alternatives", ()))
    return Decision(**values)


def _alternative_from_json(data: Mapping[str, Any], known: Mapping[str, type[Factorization]]) -> Alternative:
    factorization = _factorization_from_json(data["factorization"], known)
    increase = data["predicted_loss_increase"]
    return Alternative(factorization, as_tuples(data["rank"]), Cost(**data["cost"]), increase)


def _factorization_from_json(data: Mapping[str, Any], known: Mapping[str, type[Factorization]]) -> Factorization:
    name = data["name"]
    if name not in known:
        raise PlanError(f"unknown factorization {name!r}. Pass its class as factorizations=[...].")
    return known[name](**data["options"])
