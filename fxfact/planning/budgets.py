"""Budgets: what a network may cost."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from numbers import Real
from typing import Any, ClassVar, final

from fxfact.conv import Cost
from fxfact.errors import ArgumentError, ArgumentTypeError, BudgetError, check_int
from fxfact.utils import Timer

_LEAST_EVALUATIONS = 3  # of a metric: the dense network twice, and one other


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
        if len(given) != 1 or not _is_number(given[0]) or not given[0] > 0 or (self.fraction or 0) > 1:
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

    def unmet_error(self, least: float, network: Cost, reasons: str = "") -> BudgetError:
        """Return the error to raise if a network of this cost cannot be brought below ``least``.

        ``reasons`` says why layers have to stay, if some do.
        """
        whole, about = self.amount(network), "about " if self.unit == "ms" else ""
        return BudgetError(
            f"the budget is {_format(self.allowed(network))} {self.unit}, and these factorizations can go down to "
            f"{about}{_format(least)} ({least / whole:.3f} of {_format(whole)}). Raise the budget, or allow more "
            f"layers and factorizations{f' (some layers have to stay: {reasons})' if reasons else ''}.",
            least,
        )

    def out_of_reach_error(self, least: float, network: Cost, reasons: str) -> BudgetError:
        """Return the error to raise if the part of a network that no factorization can reach costs ``least``.

        ``reasons`` says why layers have to stay, if some do.
        """
        whole = self.amount(network)
        return BudgetError(
            f"the budget is {_format(self.allowed(network))} {self.unit}, but no factorization can reach "
            f"{_format(least)} of {_format(whole)} ({least / whole:.3f}): that is what everything else but "
            f"convolutions and linear layers takes{f', and those that have to stay ({reasons})' if reasons else ''}. "
            "Raise the budget. fxfact.plan without a budget lists every layer that has to stay.",
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
            raise BudgetError(
                "a budget of MACs needs example_inputs, which give the sizes. Pass a batch, such as "
                "example_inputs=torch.randn(1, 3, 224, 224), or calibration=batches."
            )
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


def Speedup(factor: float, *, compiled: bool = False, timer: Timer | None = None) -> Latency:  # noqa: N802 (a budget)
    """Return the budget of a network that is ``factor`` times as fast: ``Speedup(2)`` is ``Latency(1 / 2)``.

    Args:
        factor: how many times as fast as the dense network in its fastest exact variant, at least 1.
        compiled: see ``Latency``.
        timer: see ``Latency``.

    Returns:
        The budget of milliseconds.

    Raises:
        BudgetError: unless the factor is a number of at least 1.
    """
    if not _is_number(factor) or factor < 1:
        raise BudgetError(
            f"Speedup({factor!r}) is no budget. Pass a factor of at least 1: Speedup(2) is twice as fast."
        )
    return Latency(1 / factor, compiled=compiled, timer=timer)


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
        if not _is_number(self.nats) or not self.nats > 0:
            raise BudgetError(f"Loss({self.nats!r}) is no budget: pass a positive number of nats for one sample")


@final
@dataclass(frozen=True)
class Metric:
    """A bound on how much worse a metric of your own may become: ``Metric(evaluate, at_most_drop=0.5)``.

    fxfact measures a few networks along the Pareto front and returns the cheapest one that meets the bound.
    ``Plan.measured_points`` has them all.

    If ``evaluate`` returns one score for each sample, the bound is meant to hold for other samples of the same kind
    too. A network then meets it if the upper confidence limit of its mean drop is within the bound. If ``evaluate``
    returns one number, the drop of this number is within the bound, and on other samples it may be larger. If
    ``torch.distributed`` is initialised, every process scores its own samples: their scores are taken together, and
    the mean of their numbers.

    Args:
        evaluate: a function that measures a network. It gets a module in evaluation mode, without gradients, which it
            must not change (the module of an ExportedProgram). It returns a number, or a tensor (n,) with the score of
            each of n samples, always in the same order.
        at_most_drop: by how much the metric may be worse than that of the dense network, in its own unit, at least 0.
        lower_is_better: whether the metric is an error instead of a score.
        minimise: what to make as small as possible: ``fxfact.Macs``, ``fxfact.Params`` or ``fxfact.Latency``.
        evaluations: how many times ``evaluate`` is called at most, at least 3. The first two calls are on the dense
            network, which shows whether its result is random.
        confidence: the probability that the drop is within the bound in the mean of all possible samples. Only for
            scores of samples.
        refit: whether networks are measured after ``fxfact.refit`` with the batches of ``calibration``, which costs
            time and allows smaller networks. ``fxfact.factorize`` then returns a refitted network.

    Raises:
        ArgumentError, ArgumentTypeError: for an argument out of range, or of another type.
        BudgetError: if ``at_most_drop`` is not a number of at least 0.
    """

    evaluate: Callable[[Any], Any]
    at_most_drop: float
    _: KW_ONLY
    lower_is_better: bool = False
    minimise: type[Budget] = Macs
    evaluations: int = 8
    confidence: float = 0.95
    refit: bool = False

    def __post_init__(self) -> None:
        if not callable(self.evaluate):
            raise ArgumentTypeError(f"Metric: evaluate must be a function of a network, got {self.evaluate!r}")
        if not _is_number(self.at_most_drop) or self.at_most_drop < 0:
            raise BudgetError(
                f"Metric: at_most_drop must be a number of at least 0, in the unit of the metric, got "
                f"{self.at_most_drop!r}"
            )
        for name in ("lower_is_better", "refit"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentTypeError(f"Metric: {name} is True or False, got {getattr(self, name)!r}")
        if self.minimise not in (Macs, Params, Latency):
            raise ArgumentTypeError(
                f"Metric: minimise must be the class fxfact.Macs, fxfact.Params or fxfact.Latency, got "
                f"{self.minimise!r}"
            )
        check_int("Metric: evaluations", self.evaluations, _LEAST_EVALUATIONS)
        if not _is_number(self.confidence) or not 0.5 <= self.confidence < 1:
            raise ArgumentError(f"Metric: confidence must be at least 0.5 and less than 1, got {self.confidence!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _format(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 1000 else f"{amount:.4g}"
