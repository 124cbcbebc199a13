"""What is to become of one convolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fxfact.conv import ConvSpec, Cost, Sizes, as_tuples, chain_cost
from fxfact.errors import PlanError
from fxfact.factorizations import Factorization, Rank


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One convolution: factorized at a rank, or left as it is for a ``reason``.

    ``spec`` is None where the convolution could not be parsed, ``input_sizes`` where no example inputs were given.
    ``tied_to`` is the path of the convolution that holds the same weight and counts its parameters. ``predicted_loss_increase`` is by
    how much the loss is expected to grow, in nats for one sample, where data told; ``milliseconds`` how long the
    convolution takes and its chain will, in one call of the network, where that was measured.
    """

    path: str
    spec: ConvSpec | None
    input_sizes: tuple[Sizes, ...] | None = None
    tied_to: str | None = None
    factorization: Factorization | None = None
    rank: Rank | None = None
    reason: str = ""
    note: str = ""
    predicted_loss_increase: float | None = None
    milliseconds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if (self.factorization is None) != (self.rank is None) or (self.rank is not None and self.spec is None):
            raise PlanError(f"{self.path}: a rewrite needs a convolution, a factorization and a rank, got {self.rank}")

    @property
    def rewrite(self) -> str:
        """What is done where: the same for decisions that come to the same."""
        return f"{self.path} {self.factorization} {self.rank}"

    @property
    def stages(self) -> tuple[ConvSpec, ...]:
        """The convolutions that will stand here: those of the chain, or the one that is there."""
        if self.spec is None:
            return ()
        if self.factorization is None or self.rank is None:
            return (self.spec,)
        return self.factorization.layout(self.spec, self.rank)

    @property
    def before(self) -> Cost:
        """The cost of the convolution as it is."""
        return replace(self._cost((self.spec,) if self.spec else ()), ms=(self.milliseconds or (None, None))[0])

    @property
    def after(self) -> Cost:
        """The cost of what will stand here."""
        return replace(self._cost(self.stages), ms=(self.milliseconds or (None, None))[1])

    def _cost(self, stages: Sequence[ConvSpec]) -> Cost:
        return chain_cost(stages, self.input_sizes, tied=self.tied_to is not None)


def decision_to_json(decision: Decision) -> dict[str, Any]:
    """Plain data."""
    data = {field.name: getattr(decision, field.name) for field in fields(decision)}
    data["spec"] = asdict(decision.spec) if decision.spec else None
    if method := decision.factorization:
        data["factorization"] = {
            "name": method.name,
            "options": {field.name: getattr(method, field.name) for field in fields(method)},
        }
    return data


def decision_from_json(data: Mapping[str, Any], known: Mapping[str, type[Factorization]]) -> Decision:
    """From plain data; ``known`` has the factorizations by name. Raises PlanError."""
    values = dict(data)
    spec, method = values["spec"], values["factorization"]
    if spec is not None:
        values["spec"] = ConvSpec.from_json(spec)
    if method is not None:
        if method["name"] not in known:
            raise PlanError(f"unknown factorization {method['name']!r}. Pass its class as factorizations=[...].")
        values["factorization"] = known[method["name"]](**method["options"])
    for name in ("input_sizes", "rank", "milliseconds"):
        values[name] = as_tuples(values[name])
    return Decision(**values)
