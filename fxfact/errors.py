"""The errors of fxfact. Each one says where, what was expected, what was found and the way out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral


class FxfactError(Exception):
    """What every error of fxfact derives from."""


class ArgumentError(FxfactError, ValueError):
    """An argument has a value that the call cannot use."""


class ArgumentTypeError(FxfactError, TypeError):
    """An argument has a type that the call cannot use."""


class SpecError(FxfactError, ValueError):
    """The numbers do not describe a convolution, or tensors do not fit their description."""


class RankError(FxfactError, ValueError):
    """A rank is not one that the factorization can have on this convolution."""


class WeightError(FxfactError, ValueError):
    """A weight holds no values that can be decomposed (NaN, Inf, meta device, not a float)."""


class RefusedError(FxfactError, ValueError):
    """A single convolution was asked to be factorized in a way that it cannot be."""


class CaptureError(FxfactError, ValueError):
    """A model has no graph that fxfact can rewrite."""


class PlanError(FxfactError, ValueError):
    """A plan is damaged, or made for another model."""


class GraphError(FxfactError, ValueError):
    """A graph does not meet the contract that every pass relies on."""


class CalibrationError(FxfactError, ValueError):
    """Data, or statistics of data, from which nothing can be learnt about this model."""


class BudgetError(FxfactError, ValueError):
    """A budget that no plan can meet; ``least`` is the least that one could, in its unit, where that is known."""

    def __init__(self, message: str, least: float | None = None) -> None:
        super().__init__(message)
        self.least = least


class TimingError(FxfactError, RuntimeError):
    """What was to be timed did not run."""


class FileError(FxfactError, ValueError):
    """A file that cannot be written, is damaged, is of another network, or holds what could be executed."""


class VerificationError(FxfactError, ValueError):
    """A rewritten network does not compute what its own kernels say."""


def check_int(name: str, number: object, least: int, most: int | None = None) -> int:
    """A number that an argument gives as an int, which NumPy's integers become. Raises ArgumentError for others."""
    value = int(number) if isinstance(number, Integral) and not isinstance(number, bool) else None
    if value is None or value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"within {least} and {most}"
        raise ArgumentError(f"{name} must be an int, {bounds}, got {number!r}")
    return value


def first_differences(one: str, ones: Mapping[str, str], other: str, others: Mapping[str, str]) -> str:
    """What two that should have the same have where, in words: the first three differences, and how many more."""
    names = [name for name in {**ones, **others} if ones.get(name) != others.get(name)]
    lines = [f"{name}: {one} has {ones.get(name, 'nothing')}, {other} {others.get(name, 'nothing')}" for name in names]
    return "; ".join(lines[:3]) + (f" (and {len(lines) - 3} more)" if len(lines) > 3 else "")


@contextmanager
def error_context(path: str) -> Iterator[None]:
    """Name the place, in front of the message of any error of ours raised inside."""
    try:
        yield
    except FxfactError as error:
        raise type(error)(f"{path}: {error}") from error
