"""Exports factorized networks: modules to programs, programs to ONNX files."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn, onnx
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from fxfact.capture import ExampleInputs, copy_arguments
from fxfact.errors import ArgumentError, FileError
from fxfact.passes import pass_history, set_history
from fxfact.utils import atomic_write


def export_module(network: nn.Module, example_inputs: ExampleInputs, *, dynamic: bool) -> ExportedProgram:
    """Export the factorized module to a program that contains its plan."""
    (inputs, keywords), shapes = copy_arguments(example_inputs), None  # the program keeps them, and views whole data
    if dynamic:
        batch = torch.export.Dim("batch", min=1)
        inputs, keywords = tree_map(_at_least_two_samples, (inputs, dict(keywords)))
        shapes = tree_map(lambda value: {0: batch} if isinstance(value, torch.Tensor) else None, inputs or keywords)
    try:
        program = torch.export.export(network, inputs, dict(keywords), dynamic_shapes=shapes)
    except Exception as error:
        raise ArgumentError(
            f"torch.export cannot export the factorized network: {error}. Write its weights instead: -o NAME.pt."
        ) from error
    set_history(program.graph_module, pass_history(network))
    return program


def _at_least_two_samples(value: Any) -> Any:
    """Repeat a single sample, because torch.export treats a size of 1 as a constant."""
    single = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == 1
    return torch.cat([value, value]) if single else value


def save_onnx(program: ExportedProgram, path: str) -> None:
    """Write a program to an ONNX file, whole or not at all. Raises ArgumentError or FileError."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names every optional package that is missing
    try:
        exported = onnx.export(program, dynamo=True, verbose=False)
        assert exported is not None
        data = exported.model_proto.SerializeToString()
    except ImportError as error:
        raise ArgumentError(f"-o {path} needs the packages onnx and onnxscript: pip install onnx onnxscript") from error
    except Exception as error:  # the exporter raises many types
        raise FileError(
            f"{path}: torch.onnx cannot write the network: {error}. Write a program: -o NAME.pt2."
        ) from error
    with atomic_write(path) as file:
        file.write(data)
