"""What commands are given by name: a model, data, inputs."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfact.capture import ExampleInputs, inputs_of
from fxfact.errors import ArgumentError, CalibrationError, FileError
from fxfact.files import load


class Given(NamedTuple):
    """A module or an ExportedProgram, and the arguments that it is looked at with; None where none were given."""

    model: Any
    inputs: ExampleInputs | None


def read_model(text: str, inputs: list[Tensor] | None, weights: str | None) -> Given:
    """``text`` is a .pt2 file, or ``package.module:callable``, which is called without arguments and gives a module,
    with the state_dict in the file ``weights`` where that is given. Raises ArgumentError, FileError.
    """
    arguments = tuple(inputs) if inputs else None
    if text.endswith(".pt2"):
        if weights:
            raise ArgumentError("--weights is for package.module:callable; a .pt2 file has its own")
        program: ExportedProgram = load(text)
        return Given(program, arguments or (inputs_of(program) if program.example_inputs else None))
    model = _called(text)
    if weights:
        try:
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except Exception as error:  # whatever the reader finds
            raise FileError(f"{weights}: no state_dict of {text}: {error}") from error
    return Given(model.eval(), arguments)


def read_batches(path: str, size: int) -> list[Tensor]:
    """Samples along the first axis, from a .npy file or all those in a folder, ``size`` a batch. Raises
    CalibrationError.
    """
    place = Path(path)
    files = sorted(place.glob("*.npy")) if place.is_dir() else [place]
    if not files:
        raise CalibrationError(f"{path}: there is no .npy file in the folder")
    batches: list[Tensor] = []
    for file in files:
        try:
            array = np.load(file, allow_pickle=False)
            samples = torch.from_numpy(array)
            if not array.ndim:
                raise ValueError("one number, not samples along the first axis")
        except (OSError, EOFError, ValueError, TypeError, AttributeError, BadZipFile) as error:
            raise CalibrationError(f"{file}: no array that can be read: {error}") from error
        batches += torch.split(samples.float() if samples.dtype == torch.float64 else samples, size)
    return batches


def runnable(model: nn.Module | ExportedProgram) -> nn.Module:
    """What can be called."""
    return model.module() if isinstance(model, ExportedProgram) else model


def _called(text: str) -> nn.Module:
    module_name, _, name = text.partition(":")
    if not name:
        raise ArgumentError(f"MODEL is a .pt2 file or package.module:callable, got {text!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        model = getattr(importlib.import_module(module_name), name)()
    except Exception as error:
        raise ArgumentError(f"{text} cannot be called: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{text} gives a {type(model).__name__}, not a torch.nn.Module")
    return model
