"""The errors and warnings of fxfact.

Each message names the place, what was expected, what was found, and how to solve it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral


class FxfactError(Exception):
    """Base class of all errors of fxfact."""


class ArgumentError(FxfactError, ValueError):
    """An argument has an invalid value."""


class ArgumentTypeError(FxfactError, TypeError):
    """An argument has an invalid type."""


class SpecError(FxfactError, ValueError):
    """Values do not describe a convolution, or tensors do not fit the description of one."""


class RankError(FxfactError, ValueError):
    """A factorization cannot have this rank on this convolution."""


class WeightError(FxfactError, ValueError):
    """A weight cannot be decomposed: it contains NaN or Inf, is on the meta device, or is not a float tensor.

    Also raised when something is written to the weight of a factorized layer that its stages cannot express.
    """


class RefusedError(FxfactError, ValueError):
    """A factorization was requested for a single convolution to which it does not apply."""


class CaptureError(FxfactError, ValueError):
    """A model cannot be captured: fxfact has no graph or modules of it that it can rewrite."""


class PlanError(FxfactError, ValueError):
    """A plan is damaged, or was made for another model."""


class GraphError(FxfactError, ValueError):
    """A graph violates an invariant that every pass relies on."""


class CalibrationError(FxfactError, ValueError):
    """Calibration data or statistics cannot be used for this model."""


class BudgetError(FxfactError, ValueError):
    """No plan can meet the budget.

    Attributes:
        least: The smallest budget that a plan can meet, in the unit of the budget, or None if it is not known.
    """

    def __init__(self, message: str, least: float | None = None) -> None:
        super().__init__(message)
        self.least = least


class MetricError(FxfactError, ValueError):
    """The function of a ``fxfact.Metric`` failed, returned no number, or changed the network that it measured."""


class TimingError(FxfactError, RuntimeError):
    """A call that should be timed failed."""


class FileError(FxfactError, ValueError):
    """A file cannot be written, is damaged, belongs to another network, or contains code."""


class VerificationError(FxfactError, ValueError):
    """A rewritten network does not compute what its own kernels imply."""


class AccuracyWarning(UserWarning):
    """A network may have lost more accuracy than expected, or nothing is known about its accuracy."""


class SpeedWarning(UserWarning):
    """A network measures slower than the original."""


def check_int(name: str, number: object, least: int, most: int | None = None) -> int:
    """Return an argument as an int. NumPy's integers are converted.

    Raises ArgumentError if ``number`` is not an integer, below ``least``, or above ``most``.
    """
    value = int(number) if isinstance(number, Integral) and not isinstance(number, bool) else None
    if value is None or value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ArgumentError(f"{name} must be an int, {bounds}, got {number!r}")
    return value


def first_differences(one: str, ones: Mapping[str, str], other: str, others: Mapping[str, str]) -> str:
    """Describe the first three differences between two mappings that should be equal, and count the others.

    ``one`` and ``other`` name the owners of the mappings ``ones`` and ``others`` in the text.
    """
    names = [name for name in {**ones, **others} if ones.get(name) != others.get(name)]
    lines = [f"{name}: {one} has {ones.get(name, 'nothing')}, {other} {others.get(name, 'nothing')}" for name in names]
    return "; ".join(lines[:3]) + (f" (and {len(lines) - 3} more)" if len(lines) > 3 else "")


@contextmanager
def error_context(path: str) -> Iterator[None]:
    """Put ``path`` in front of the message of any FxfactError that is raised inside."""
    try:
        yield
    except FxfactError as error:
        raise type(error)(f"{path}: {error}") from error
