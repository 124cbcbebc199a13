"""Budgets: what a network may cost."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar, final

from fxfact.conv import Cost
from fxfact.errors import BudgetError
from fxfact.utils import Timer


@dataclass(frozen=True)
class Budget(ABC):
    """A bound on the cost of the whole network, including linear layers and everything else.

    Args:
        fraction: the bound as a share of the cost of the dense network, above 0 and at most 1.
        at_most: the bound itself. Pass one of the two.

    Raises:
        BudgetError: unless exactly one of the two is given and in range.
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
                f"{name}({self.fraction!r}, {self.bound}={self.at_most!r}) is no budget. Pass a share of at most 1, "
                f"{name}(0.5), or {name}({self.example})."
            )

    @abstractmethod
    def amount(self, cost: Cost) -> float:
        """Return the part of a cost that this budget bounds. Raises BudgetError if it is not known."""

    def allowed(self, network: Cost) -> float:
        """Return the bound for a network of this cost."""
        return self.at_most if self.at_most is not None else (self.fraction or 0) * self.amount(network)

    def unmet_error(self, least: float, network: Cost) -> BudgetError:
        """Return the error to raise if a network of this cost cannot be brought below ``least``."""
        whole = self.amount(network)
        return BudgetError(
            f"the budget is {_format(self.allowed(network))} {self.unit}, and these factorizations can go down to "
            f"{_format(least)} ({least / whole:.3f} of {_format(whole)}). Raise the budget, or allow more layers "
            "and factorizations.",
            least,
        )

    def out_of_reach_error(self, least: float, network: Cost) -> BudgetError:
        """Return the error to raise if the part of a network that no factorization can reach costs ``least``."""
        whole = self.amount(network)
        return BudgetError(
            f"the budget is {_format(self.allowed(network))} {self.unit}, but no factorization can reach "
            f"{_format(least)} of {_format(whole)} ({least / whole:.3f}): that is what everything else but "
            "convolutions and linear layers takes, and those that have to stay (fxfact.plan without a budget lists "
            "them with the reason). Raise the budget.",
            least,
        )


@final
@dataclass(frozen=True)
class Macs(Budget):
    """A bound on multiply-accumulates (MACs) for one sample: ``Macs(0.5)`` or ``Macs(at_most=20_000_000)``.

    Args:
        fraction: the bound as a share of the MACs of the dense network, above 0 and at most 1.
        at_most: the bound itself. Pass one of the two.

    Raises:
        BudgetError: unless exactly one of the two is given and in range.
    """

    unit = "MACs"

    def amount(self, cost: Cost) -> int:
        """Return the MACs.

        Args:
            cost: the cost of a network.

        Returns:
            Its MACs for one sample.

        Raises:
            BudgetError: if they are not known.
        """
        if cost.macs is None:
            raise BudgetError("a budget of MACs needs example_inputs, which give the sizes")
        return cost.macs


@final
@dataclass(frozen=True)
class Params(Budget):
    """A bound on the number of parameters: ``Params(0.5)`` or ``Params(at_most=900_000)``.

    Args:
        fraction: the bound as a share of the parameters of the dense network, above 0 and at most 1.
        at_most: the bound itself. Pass one of the two.

    Raises:
        BudgetError: unless exactly one of the two is given and in range.
    """

    unit = "parameters"

    def amount(self, cost: Cost) -> int:
        """Return the parameters.

        Args:
            cost: the cost of a network.

        Returns:
            The number of its parameters.
        """
        return cost.params


@final
@dataclass(frozen=True, init=False)
class Latency(Budget):
    """A bound on the milliseconds of one call with the example inputs, on this machine.

    Args:
        fraction: the bound as a share of the time of the dense network, in the fastest of its exact variants (batch
            norms folded, channels_last, ...), above 0 and at most 1.
        at_most_ms: the bound itself, in milliseconds. Pass one of the two.
        compiled: measure the network as ``torch.compile`` runs it: with frozen weights, called from C++ on processors
            and as CUDA graphs on GPUs (``freezing``, ``cpp_wrapper`` and ``triton.cudagraphs`` of
            ``torch._inductor.config``).
        timer: measures the calls. Default: this machine's clock.

    Raises:
        BudgetError: unless exactly one of the bounds is given and in range, or for a ``compiled`` or a ``timer`` of
            another type.
    """

    compiled: bool = False
    timer: Timer = field(default_factory=Timer, compare=False, repr=False)

    unit = "ms"
    bound = "at_most_ms"
    example = "at_most_ms=12"

    def __init__(
        self,
        fraction: float | None = None,
        *,
        at_most_ms: float | None = None,
        compiled: bool = False,
        timer: Timer | None = None,
    ) -> None:
        super().__init__(fraction, at_most_ms)
        if not isinstance(compiled, bool):
            raise BudgetError(f"Latency: compiled is True or False, got {compiled!r}")
        if timer is not None and not isinstance(timer, Timer):
            raise BudgetError(f"Latency: timer must be a fxfact.utils.Timer, got {timer!r}")
        object.__setattr__(self, "compiled", compiled)
        object.__setattr__(self, "timer", timer or Timer())

    def amount(self, cost: Cost) -> float:
        """Return the milliseconds.

        Args:
            cost: the cost of a network.

        Returns:
            The milliseconds of one call.

        Raises:
            BudgetError: if they were not measured.
        """
        if cost.ms is None:
            raise BudgetError("a budget of milliseconds needs example_inputs, on which to measure")
        return cost.ms


@final
@dataclass(frozen=True)
class Loss:
    """A bound on the increase of the loss, as measured on data: ``Loss(0.05)``.

    The increase is the KL divergence from the original network's outputs, in nats for one sample. (The loss of
    a classifier grows by 1 nat if the probability of the right class falls to 1/e of its value.) fxfact searches for
    the network with the fewest MACs within the bound, or with the fewest parameters if MACs are not known.

    Args:
        nats: the bound, above 0.

    Raises:
        BudgetError: unless it is a positive number.
    """

    nats: float

    def __post_init__(self) -> None:
        if isinstance(self.nats, bool) or not isinstance(self.nats, Real) or not 0 < self.nats < math.inf:
            raise BudgetError(f"Loss({self.nats!r}) is no budget: pass a positive number of nats for one sample")


def _format(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 1000 else f"{amount:.4g}"
