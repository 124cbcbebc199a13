"""What a capture is compared with: the model itself, run on its example inputs and on others drawn alike."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxfact.capture.base import ExampleInputs, check_arguments, random_like, reason_of, run_model
from fxfact.capture.guards import OriginalTensorGuard, ParameterGuard
from fxfact.capture.recorder import ModuleRecord, record_modules
from fxfact.errors import CaptureError
from fxfact.utils import alias_copy, copy_structure, difference, to_eval

_SAME = 0.1  # of what rounding may do to other kernels: here they are the same, and so are the operators


@dataclass(frozen=True, eq=False)
class EquivalenceCheck:
    """What the model itself gives on the example inputs and, where it runs on them, on others drawn alike."""

    model: nn.Module
    runs: tuple[tuple[ExampleInputs, Any], ...]
    observed: ModuleRecord

    @classmethod
    def of(cls, model: nn.Module, own: nn.Module, example_inputs: ExampleInputs) -> EquivalenceCheck:
        """``own`` is a copy with what is to be folded folded. Raises CaptureError where the model does not run on its
        example inputs, or not twice alike.
        """
        check_arguments(model, example_inputs)
        plain, watched = to_eval(alias_copy(model)), copy_structure(own)
        try:
            with OriginalTensorGuard(model):
                observed = record_modules(watched, example_inputs)
            runs = [(example_inputs, _run(plain, example_inputs, model))]
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} fails on example_inputs: {reason_of(error)}. Pass inputs that it accepts."
            ) from error
        if reason := difference(runs[0][1], observed.output, strictness=_SAME):
            raise CaptureError(
                f"two runs of {type(model).__name__} from one seed are not alike: {reason}. Make it deterministic, and "
                "return tensors; or pass no example_inputs."
            )
        other = random_like(example_inputs)
        with contextlib.suppress(Exception):  # drawn inputs need not be ones that the model takes
            runs.append((other, _run(plain, other, model)))
        return cls(model, tuple(runs), observed)

    def objection(self, candidate: nn.Module) -> str:
        """Why the candidate does not compute the same; empty where it does."""
        candidate.eval()
        for inputs, expected in self.runs:
            try:
                found = _run(candidate, inputs, self.model)
            except Exception as error:
                return f"it fails where the model does not: {reason_of(error)}"
            if reason := difference(expected, found, strictness=_SAME):
                return reason
        return ""


def _run(network: nn.Module, example_inputs: ExampleInputs, model: nn.Module) -> Any:
    with ParameterGuard(network), OriginalTensorGuard(model):
        return run_model(network, example_inputs)
