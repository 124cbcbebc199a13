"""Reads what a command line names: a model, batches of data, example inputs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfact.capture import ExampleInputs, inputs_of
from fxfact.cli.options import Arguments
from fxfact.errors import ArgumentError, CalibrationError, FileError, FxfactError
from fxfact.serialization import load


class LoadedModel(NamedTuple):
    """A module or an ExportedProgram, and its example inputs, or None if there are none."""

    model: Any
    inputs: ExampleInputs | None


def load_model(text: str, inputs: list[Tensor] | None, weights: str | None) -> LoadedModel:
    """Load a .pt2 file, or call ``package.module:callable`` without arguments and load ``weights`` into the module.

    ``weights`` is a state dict, or a file that fxfact wrote, whose plan is then applied to the module. ``inputs``
    become the example inputs of a program that has none. Raises ArgumentError or FileError.
    """
    example_inputs = tuple(inputs) if inputs else None
    if text.endswith(".pt2"):
        if weights:
            raise ArgumentError("--weights only applies to package.module:callable. A .pt2 file contains its weights.")
        program: ExportedProgram = load(text)
        if example_inputs and not program.example_inputs:
            program.example_inputs = (example_inputs, {})
        return LoadedModel(program, example_inputs or (inputs_of(program) if program.example_inputs else None))
    model = _build_module(text)
    if weights:
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            if isinstance(state, Mapping) and "fxfact" in state:
                model = load(weights, model)
            else:
                model.load_state_dict(state)
        except FxfactError:
            raise
        except Exception as error:  # torch.load raises many types for damaged files
            raise FileError(f"{weights}: cannot be loaded as the state dict of {text}: {error}") from error
    return LoadedModel(model.eval(), example_inputs)


def load_described_model(args: Arguments) -> LoadedModel:
    """Load MODEL. Raises ArgumentError if --input is given for a program that has other example inputs of its own."""
    loaded = load_model(args.model, args.input, args.weights)
    program = loaded.model
    if args.input and isinstance(program, ExportedProgram) and program.example_inputs[0] is not loaded.inputs:
        raise ArgumentError(f"{args.model} contains its example inputs. Remove --input.")
    return loaded


def import_function(option: str, text: str) -> Any:
    """Import ``package.module:callable``, the value of an option. Raises ArgumentError."""
    module_name, _, name = text.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except Exception as error:  # a module can raise anything while it is imported
        raise ArgumentError(
            f"{option} {text} cannot be imported: {type(error).__name__}: {error}. Pass package.module:callable."
        ) from error


def input_files(args: Arguments) -> list[str | None]:
    """Return the files that a command reads."""
    return [args.model, args.weights, getattr(args, "calibration", None), getattr(args, "statistics", None)]


def read_batches(path: str, size: int, dtype: torch.dtype) -> list[Any]:
    """Read samples along the first axis from a .npy or .npz file, or all those of a folder, in batches of ``size``.

    Batches of a .npz file with several arrays are mappings from their names, which are those of the model's arguments.
    Floating-point samples are converted to ``dtype``, the dtype of the model. Raises CalibrationError.
    """
    root = Path(path)
    files = sorted(file for file in root.iterdir() if file.suffix in (".npy", ".npz")) if root.is_dir() else [root]
    if not files:
        raise CalibrationError(f"{path}: the folder contains no .npy or .npz file.")
    batches: list[Any] = []
    for file in files:
        try:
            arrays = _read_arrays(file)
            if not all(array.ndim for array in arrays.values()) or len({len(array) for array in arrays.values()}) != 1:
                raise ValueError("expected samples along the first axis, as many in every array")
        except Exception as error:  # numpy.load raises many types for damaged files
            raise CalibrationError(f"{file}: cannot be read as an array: {error}") from error
        converted = [array.to(dtype) if array.is_floating_point() else array for array in arrays.values()]
        parts = zip(*(torch.split(array, size) for array in converted), strict=True)
        batches += [part[0] if len(arrays) == 1 else dict(zip(arrays, part, strict=True)) for part in parts]
    return batches


def _read_arrays(file: Path) -> dict[str, Tensor]:
    """Return the arrays of a .npy or .npz file by name."""
    loaded = np.load(file, allow_pickle=False)
    if file.suffix != ".npz":
        return {"": torch.from_numpy(loaded)}
    with loaded:
        return {name: torch.from_numpy(loaded[name]) for name in loaded.files}


def model_dtype(model: nn.Module | ExportedProgram) -> torch.dtype:
    """Return the dtype of the model's first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def check_output(path: str | None, *inputs: str | None) -> None:
    """Raise FileError if ``path`` cannot be written, or is one of the input files. Called before any work is done."""
    if path is None:
        return
    folder = os.path.dirname(path) or os.curdir
    if not os.path.isdir(folder):
        raise FileError(f"{path}: cannot be written, because {folder} is not a folder.")
    if os.path.isdir(path):
        raise FileError(f"{path}: cannot be written, because it is a folder.")
    for other in inputs:
        if other is not None and os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other):
            raise FileError(f"{path}: would overwrite an input of this command. Write to another file.")


def callable_module(model: nn.Module | ExportedProgram) -> nn.Module:
    """Return the module of a program, or the module itself."""
    return model.module() if isinstance(model, ExportedProgram) else model


def _build_module(text: str) -> nn.Module:
    module_name, _, name = text.partition(":")
    if not name:
        way_out = " Pass a file of weights as --weights or --other-weights." if text.endswith((".pt", ".pth")) else ""
        raise ArgumentError(f"MODEL must be a .pt2 file or package.module:callable, got {text!r}.{way_out}")
    try:
        model = getattr(importlib.import_module(module_name), name)()
    except Exception as error:
        raise ArgumentError(f"{text} cannot be called: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{text} returned a {type(model).__name__}, expected a torch.nn.Module.")
    return model


def example_inputs_of(loaded: LoadedModel) -> ExampleInputs | None:
    """Return the example inputs of a module. A program contains its own."""
    return None if isinstance(loaded.model, ExportedProgram) else loaded.inputs
