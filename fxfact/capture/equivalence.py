"""Compares a captured network with the model, on the example inputs and on random inputs like them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fxfact.capture.base import ExampleInputs, check_arguments, random_like, reason_of, run_model
from fxfact.capture.guards import OriginalTensorGuard, ParameterChangedError, ParameterGuard, PrivateCopy
from fxfact.capture.recorder import ModuleRecord, record_modules
from fxfact.conv import has_hooks, is_conv
from fxfact.errors import CaptureError
from fxfact.graph import preserve_state
from fxfact.utils import copy_structure, difference, to_eval

_STRICTNESS = 0.1  # the share of the usual tolerance: a captured network runs the same operators as the model


@dataclass(frozen=True, eq=False)
class EquivalenceCheck:
    """The outputs of the model that a captured network must reproduce.

    Attributes:
        model: the model itself, which is not run.
        runs: pairs of inputs and outputs: the example inputs, and random ones if the model runs on them.
    """

    model: nn.Module
    runs: tuple[tuple[ExampleInputs, Any], ...]

    @classmethod
    def of(cls, model: nn.Module, copies: PrivateCopy, example_inputs: ExampleInputs) -> EquivalenceCheck:
        """Run a private copy of the model in evaluation mode.

        Args:
            model: the model.
            copies: private copies of the model.
            example_inputs: the inputs to run on.

        Raises:
            CaptureError: if the model does not run on its example inputs, changes a parameter, or returns no tensors.
        """
        check_arguments(model, example_inputs)
        network, name = copies.get(), type(model).__name__
        with _evaluation_mode(network), _explain_failure(name):
            guard = ParameterGuard(network)
            try:
                with guard, OriginalTensorGuard(model):
                    output = run_model(network, example_inputs)
            finally:
                guard.check()
            if reason := difference(output, output, strictness=_STRICTNESS):
                raise CaptureError(f"{name} cannot be compared: {reason}. Return tensors, or pass no inputs or data.")
            runs = [(example_inputs, output)]
            random_inputs = random_like(example_inputs)
            with contextlib.suppress(Exception):  # the model need not accept random inputs
                runs.append((random_inputs, _run(network, random_inputs, model)))
        return cls(model, tuple(runs))

    def mismatch(self, network: nn.Module) -> str:
        """Say why a network does not compute what the model computes, or return "" if it does.

        The network is put in evaluation mode and stays in it.
        """
        to_eval(network)
        for inputs, expected in self.runs:
            try:
                found = _run(network, inputs, self.model)
            except Exception as error:
                return f"it fails where the model does not: {reason_of(error)}"
            if reason := difference(expected, found, strictness=_STRICTNESS):
                return reason
        return ""

    def graph_mismatch(self, graph_module: fx.GraphModule) -> str:
        """Say why a graph module does not compute what the model computes, or return "" if it does.

        The graph module stays as it is. It is copied if its modules may keep a state of their own.
        """
        calls = [node for node in graph_module.graph.nodes if node.op == "call_module"]
        parts = [part for node in calls for part in graph_module.get_submodule(str(node.target)).modules()]
        if not all(type(part).__module__.startswith("torch.nn") and not has_hooks(part) for part in parts):
            return self.mismatch(copy_structure(graph_module))
        with preserve_state(graph_module):
            return self.mismatch(graph_module)

    def record(self, network: nn.Module) -> ModuleRecord:
        """Run a private copy again and record the calls of its convolutions.

        Args:
            network: the copy, which cannot be used again.

        Raises:
            CaptureError: if the second run differs from the first.
        """
        name = type(self.model).__name__
        with _explain_failure(name), OriginalTensorGuard(self.model):
            record = record_modules(network, self.runs[0][0])
        self._check_repeated(record.output)
        return record

    def check_parameters(self, network: nn.Module) -> None:
        """Run a private copy in training mode, and raise ParameterChangedError if it changes a parameter.

        Modules keep their modes if any of them is in training mode. If none is, only parameters of convolutions count:
        the model's own Python goes on changing others, such as a codebook that follows averages. A model that does not
        run in training mode, such as one with batch norms and a single value for each channel, is not checked.

        Args:
            network: the copy, which cannot be used again.
        """
        is_training = any(module.training for module in network.modules())
        if not is_training:
            network.train()
        with ParameterGuard(network) as guard, OriginalTensorGuard(self.model), contextlib.suppress(Exception):
            run_model(network, self.runs[0][0])
        try:
            guard.check()
        except ParameterChangedError as error:
            if is_training or is_conv(network.get_submodule(error.name.rpartition(".")[0])):
                raise

    def check_deterministic(self, network: nn.Module) -> None:
        """Run a private copy again. Raises CaptureError if the second run differs from the first."""
        with _explain_failure(type(self.model).__name__):
            self._check_repeated(_run(to_eval(network), self.runs[0][0], self.model))

    def _check_repeated(self, output: Any) -> None:
        if reason := difference(self.runs[0][1], output, strictness=_STRICTNESS):
            raise CaptureError(
                f"two runs of {type(self.model).__name__} from one seed differ: {reason}. Make it "
                "deterministic, or pass neither example_inputs nor data."
            )


def _run(network: nn.Module, example_inputs: ExampleInputs, model: nn.Module) -> Any:
    with ParameterGuard(network), OriginalTensorGuard(model):
        return run_model(network, example_inputs)


@contextlib.contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode, and restore the modes of its modules at exit."""
    modes = {module: module.training for module in network.modules()}
    to_eval(network)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _explain_failure(name: str) -> Iterator[None]:
    """Turn an error of the model into a CaptureError that says on what it failed."""
    try:
        yield
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{name} fails on example_inputs: {reason_of(error)}. Pass inputs that it accepts."
        ) from error
