"""What a network may cost."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, final

from fxfact.conv import Cost
from fxfact.errors import BudgetError


@dataclass(frozen=True)
class Budget(ABC):
    """A share of what the whole dense network costs, linear layers and all, or an absolute bound ``at_most``.

    Raises BudgetError unless it is one of the two, positive, the share within 1.
    """

    fraction: float | None = None
    at_most: float | None = None

    unit: ClassVar[str] = ""
    bound: ClassVar[str] = "at_most"
    example: ClassVar[str] = "at_most=900_000"

    def __post_init__(self) -> None:
        given = [value for value in (self.fraction, self.at_most) if value is not None]
        name = type(self).__name__
        numbers = all(isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v) for v in given)
        if len(given) != 1 or not numbers or not given[0] > 0 or (self.fraction or 0) > 1:
            raise BudgetError(
                f"{name}({self.fraction!r}, {self.bound}={self.at_most!r}) is no budget. Pass a share within 1, "
                f"{name}(0.5), or {name}({self.example})."
            )

    @abstractmethod
    def amount(self, cost: Cost) -> float:
        """Of a cost what this budget is about. Raises BudgetError where it is not known."""

    def allowed(self, network: Cost) -> float:
        """The bound for a network that costs this much."""
        return self.at_most if self.at_most is not None else (self.fraction or 0) * self.amount(network)

    def unmet(self, least: float, network: Cost) -> BudgetError:
        """What to raise where a network that costs this much cannot go below ``least``."""
        whole = self.amount(network)
        return BudgetError(
            f"the budget is {_shown(self.allowed(network))} {self.unit}, and these factorizations can go down to "
            f"{_shown(least)} ({least / whole:.3f} of {_shown(whole)}). Raise it, or let it have more convolutions and "
            "factorizations.",
            least,
        )


@final
@dataclass(frozen=True)
class Macs(Budget):
    """Multiply-accumulates for one sample."""

    unit = "MACs"

    def amount(self, cost: Cost) -> int:
        """The MACs."""
        if cost.macs is None:
            raise BudgetError("a budget of MACs needs example_inputs, which give the sizes")
        return cost.macs


@final
@dataclass(frozen=True)
class Params(Budget):
    """Numbers stored."""

    unit = "parameters"

    def amount(self, cost: Cost) -> int:
        """The parameters."""
        return cost.params


@final
@dataclass(frozen=True, init=False)
class Latency(Budget):
    """Milliseconds of one call with the example inputs, on this machine: a share of what the dense network takes in the
    fastest of its forms, or ``at_most_ms``. ``compiled``: as torch.compile runs it, with frozen weights, on processors
    called from C++, on GPUs as CUDA graphs (of ``torch._inductor.config``: ``freezing``, ``cpp_wrapper``,
    ``triton.cudagraphs``).
    """

    compiled: bool = False

    unit = "ms"
    bound = "at_most_ms"
    example = "at_most_ms=12"

    def __init__(
        self, fraction: float | None = None, *, at_most_ms: float | None = None, compiled: bool = False
    ) -> None:
        super().__init__(fraction, at_most_ms)
        if not isinstance(compiled, bool):
            raise BudgetError(f"Latency: compiled is True or False, got {compiled!r}")
        object.__setattr__(self, "compiled", compiled)

    def amount(self, cost: Cost) -> float:
        """The milliseconds."""
        if cost.ms is None:
            raise BudgetError("a budget of milliseconds needs example_inputs, on which to measure")
        return cost.ms


@final
@dataclass(frozen=True)
class Loss:
    """By how much the loss may grow, in nats for one sample, measured on data: the KL divergence from the original.

    The cheapest network under it is looked for, by MACs where they are known. Raises BudgetError unless positive.
    """

    nats: float

    def __post_init__(self) -> None:
        if isinstance(self.nats, bool) or not isinstance(self.nats, Real) or not 0 < self.nats < math.inf:
            raise BudgetError(f"Loss({self.nats!r}) is no budget: it is a positive number of nats for one sample")


def _shown(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 1000 else f"{amount:.4g}"
