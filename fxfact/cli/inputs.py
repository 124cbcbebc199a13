"""What commands are given by name: a model, data, inputs."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfact.capture import ExampleInputs, inputs_of
from fxfact.errors import ArgumentError, CalibrationError, FileError
from fxfact.serialization import load

Arguments = argparse.Namespace


class LoadedModel(NamedTuple):
    """A module or an ExportedProgram, and the arguments that it is looked at with; None where none were given."""

    model: Any
    inputs: ExampleInputs | None


def read_model(text: str, inputs: list[Tensor] | None, weights: str | None) -> LoadedModel:
    """``text`` is a .pt2 file, or ``package.module:callable``, which is called without arguments and gives a module,
    with the state_dict in the file ``weights`` where that is given. Raises ArgumentError, FileError.
    """
    arguments = tuple(inputs) if inputs else None
    if text.endswith(".pt2"):
        if weights:
            raise ArgumentError("--weights is for package.module:callable; a .pt2 file has its own")
        program: ExportedProgram = load(text)
        return LoadedModel(program, arguments or (inputs_of(program) if program.example_inputs else None))
    model = _called(text)
    if weights:
        try:
            model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        except Exception as error:  # whatever the reader finds
            raise FileError(f"{weights}: no state_dict of {text}: {error}") from error
    return LoadedModel(model.eval(), arguments)


def read_described(given: Arguments) -> LoadedModel:
    """The model, of which a program says itself what it is called with. Raises ArgumentError, FileError."""
    read = read_model(given.model, given.input, given.weights)
    if given.input and isinstance(read.model, ExportedProgram):
        raise ArgumentError("a .pt2 file says what it is called with: pass no --input")
    return read


def files_of(given: Arguments) -> list[str | None]:
    """What a command reads."""
    return [given.model, given.weights, *(getattr(given, name, None) for name in ("calibration", "statistics"))]


def read_batches(path: str, size: int, dtype: torch.dtype) -> list[Tensor]:
    """Samples along the first axis, from a .npy file or all those in a folder, ``size`` a batch; floating-point ones
    become the ``dtype`` of the model. Raises CalibrationError.
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
        except Exception as error:  # whatever the reader finds
            raise CalibrationError(f"{file}: no array that can be read: {error}") from error
        batches += torch.split(samples.to(dtype) if samples.is_floating_point() else samples, size)
    return batches


def dtype_of(model: nn.Module | ExportedProgram) -> torch.dtype:
    """Of what it computes with."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def check_output(path: str | None, *read: str | None) -> None:
    """Raise FileError before anything is done where a file cannot be written, or would take the place of one that is
    read.
    """
    if path is None:
        return
    folder = os.path.dirname(path) or os.curdir
    if not os.path.isdir(folder):
        raise FileError(f"{path}: it cannot be written there: {folder} is no folder")
    if os.path.isdir(path):
        raise FileError(f"{path}: it cannot be written there: it is a folder")
    for other in read:
        if other is not None and os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):
            raise FileError(f"{path}: it would take the place of what is read. Write to another file.")


def runnable(model: nn.Module | ExportedProgram) -> nn.Module:
    """What can be called."""
    return model.module() if isinstance(model, ExportedProgram) else model


def _called(text: str) -> nn.Module:
    module_name, _, name = text.partition(":")
    if not name:
        raise ArgumentError(f"MODEL is a .pt2 file or package.module:callable, got {text!r}")
    try:
        model = getattr(importlib.import_module(module_name), name)()
    except Exception as error:
        raise ArgumentError(f"{text} cannot be called: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{text} gives a {type(model).__name__}, not a torch.nn.Module")
    return model
