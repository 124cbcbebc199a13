"""What a capture is compared with: the model itself, run on its example inputs and on others drawn alike."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxfact.capture.base import ExampleInputs, check_arguments, drawn_alike, reason_of, run_model
from fxfact.capture.guard import OnlyTheCopy, ParameterGuard
from fxfact.capture.observe import Observed, observe
from fxfact.comparing import difference
from fxfact.copying import copy_on_same_parameters, evaluated, private_copy
from fxfact.errors import CaptureError

_SAME = 0.1  # of what rounding may do to other kernels: here they are the same, and so are the operators


@dataclass(frozen=True, eq=False)
class Reference:
    """What the model itself gives on the example inputs and, where it runs on them, on others drawn alike."""

    model: nn.Module
    runs: tuple[tuple[ExampleInputs, Any], ...]
    observed: Observed

    @classmethod
    def of(cls, model: nn.Module, own: nn.Module, example_inputs: ExampleInputs) -> Reference:
        """``own`` is a copy with what is to be folded folded. Raises CaptureError where the model does not run on its
        example inputs, or not twice alike.
        """
        check_arguments(model, example_inputs)
        plain, watched = evaluated(private_copy(model)), copy_on_same_parameters(own)
        try:
            with OnlyTheCopy(model):
                observed = observe(watched, example_inputs)
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
        other = drawn_alike(example_inputs)
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
    with ParameterGuard(network), OnlyTheCopy(model):
        return run_model(network, example_inputs)
