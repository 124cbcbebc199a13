"""What a caller says about batches, transform= and max_samples=, checked and put together with the batches."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.export import ExportedProgram

from fxfact.calibration.batches import Batches, BatchReader, Transform, cut_batch, first_batch
from fxfact.calibration.statistics import Statistics
from fxfact.capture import ExampleInputs
from fxfact.errors import ArgumentError, ArgumentTypeError, check_int

MAX_SAMPLES = 1024  # by default; more hardly change a plan, and they are kept in memory


def with_batch_options(
    transform: Transform | None, max_samples: int | None, **given: Batches | Statistics | None
) -> list[Any]:
    """Return each of the caller's arguments that may be batches: a BatchReader with these options if it is.

    Args:
        transform: Makes of a batch what the model is called with.
        max_samples: How many samples to take at most. None: all.
        given: The caller's arguments by name. Statistics and None are returned as they are.

    Raises:
        ArgumentError: For options without batches, and a limit out of range.
        ArgumentTypeError: For a transform that cannot be called.
    """
    if transform is not None and not callable(transform):
        raise ArgumentTypeError(
            "transform must be a function that makes of a batch what the model is called with, got "
            f"{type(transform).__name__}"
        )
    if max_samples is not None:
        max_samples = check_int("max_samples", max_samples, 1)
    read = [
        value
        if value is None or isinstance(value, Statistics)
        else BatchReader(value, name, transform, max_samples, has_transform=transform is not None)
        for name, value in given.items()
    ]
    limit = None if max_samples == MAX_SAMPLES else max_samples
    unused = [name for name, option in (("transform", transform), ("max_samples", limit)) if option is not None]
    if unused and not any(isinstance(value, BatchReader) for value in read):
        raise ArgumentError(
            f"{unused[0]} is only used with batches. Remove it, or pass batches as {next(iter(given))}."
        )
    return read


def with_example(
    model: nn.Module | ExportedProgram, example_inputs: ExampleInputs | None, calibration: Batches | Statistics | None
) -> tuple[ExampleInputs | None, ExampleInputs | None, Batches | Statistics | None]:
    """Return the example inputs, by default the first sample of the batches, and that batch whole; then the data.

    The batch is None if the example inputs are not its first sample. Raises CalibrationError.
    """
    if example_inputs is not None or isinstance(model, ExportedProgram):
        return example_inputs, None, calibration
    if calibration is None or isinstance(calibration, Statistics):
        return None, None, calibration
    batch, batches = first_batch(model, calibration)
    return cut_batch(batch, 1), batch, batches
