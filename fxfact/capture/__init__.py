"""Makes models ready for rewriting: as a traced graph, by their modules, or as an exported program."""

from fxfact.capture.base import (
    Arguments,
    Captured,
    ExampleInputs,
    arguments_of,
    copy_arguments,
    reason_of,
    run_model,
    samples_of,
    seeded_rng,
)
from fxfact.capture.export import inputs_of, reexport
from fxfact.capture.select import CaptureMode, capture, check_kept_by_copies

__all__ = [
    "Arguments",
    "CaptureMode",
    "Captured",
    "ExampleInputs",
    "arguments_of",
    "capture",
    "check_kept_by_copies",
    "copy_arguments",
    "inputs_of",
    "reason_of",
    "reexport",
    "run_model",
    "samples_of",
    "seeded_rng",
]
