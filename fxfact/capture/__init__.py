"""A model becomes something whose convolutions can be found and replaced, in three ways, each compared with it."""

from fxfact.capture.base import (
    Arguments,
    Captured,
    ExampleInputs,
    Rung,
    arguments_of,
    copied_arguments,
    drawn_from_seed,
    reason_of,
    run_model,
    samples_of,
)
from fxfact.capture.exported import inputs_of, reexport
from fxfact.capture.ladder import How, capture, check_kept_by_copies
from fxfact.capture.memory import ByMemory

__all__ = [
    "Arguments",
    "ByMemory",
    "Captured",
    "ExampleInputs",
    "How",
    "Rung",
    "arguments_of",
    "capture",
    "check_kept_by_copies",
    "copied_arguments",
    "drawn_from_seed",
    "inputs_of",
    "reason_of",
    "reexport",
    "run_model",
    "samples_of",
]
