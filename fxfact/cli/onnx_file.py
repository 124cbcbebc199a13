"""Writes a program as an ONNX file."""

from __future__ import annotations

from torch import onnx
from torch.export import ExportedProgram

from fxfact.errors import ArgumentError, FileError
from fxfact.utils import atomic_write


def save_onnx(program: ExportedProgram, path: str) -> None:
    """Write a program to an ONNX file, whole or not at all. Raises ArgumentError or FileError."""
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
