"""Verification: two errors of a factorized network, told apart.

The graph error is the difference from the original with the composed kernels put in. It is rounding if the rewrite is
correct. The end-to-end error is the difference from the original itself. It is the cost of the approximation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fxfact.analysis.overflow import first_overflow, is_finite, single_precision_error
from fxfact.analysis.reference import (
    composed_kernels,
    conv_weight,
    copy_as_module,
    prepare_original,
    stages_of,
)
from fxfact.analysis.report_data import format_approximation_error, format_graph_check, format_loss, format_overflow
from fxfact.calibration import DivergenceEvaluator
from fxfact.capture import ExampleInputs, inputs_of, reason_of, run_model, samples_of
from fxfact.conv import ConvCall, LinearCallMode, looks_like_conv
from fxfact.errors import ArgumentError, ArgumentTypeError, CalibrationError, CaptureError, VerificationError
from fxfact.graph import with_kernels
from fxfact.passes import last_plan
from fxfact.planning import Plan
from fxfact.utils import (
    Column,
    StorageIndex,
    Table,
    alias_copy,
    check_finite_state,
    full_precision,
    plain_tensors,
    relative_error,
    seeded_randn,
    terminal_width,
    to_eval,
    tolerance_for,
    wrap_lines,
)

_SAFETY = 5  # between what rounding did in a few trials and the tolerance
_TENSOR_SHARE = 0.01  # a tensor has changed if it differs by more than this share of an output's tolerance


@dataclass(frozen=True, kw_only=True)
class SiteErrors:
    """The errors of one rewritten convolution, relative to the original.

    Attributes:
        path: Name of the convolution in the original.
        weight: Error of the composed kernel, ‖Ŵ − W‖_F / ‖W‖_F.
        output: Error of the output on the input that the convolution gets in the original, or None if the convolution
            was not called.
    """

    path: str
    weight: float
    output: float | None


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The errors of a factorized network on some inputs. ``print`` shows them as a table.

    Every error is relative: ‖found − expected‖ / ‖expected‖, of the output tensor for which it is largest.

    Attributes:
        graph: Error against the reference, which is the original with its kernels replaced by the composed kernels of
            the factorized network. It is rounding only if the rewrite is correct. If the plan folds weights or prepares
            the network for inference, this also covers the difference between the original before and after that.
        end_to_end: Error against the original itself: the approximation error, which is what the factorization costs.
        tolerance: Largest ``graph`` that counts as rounding: 1e-10 in double precision, 1e-4 in single precision and
            5e-2 in half precision. It is larger if rounding moves the output by more, as it does if layers quantize
            their inputs: five times what changes of the kernels by a tenth of these numbers cause.
        sites: Errors of every rewritten convolution.
        changed: Names of other tensors that are not the original's any more, for example after ``refit``, ``distill``
            or training. The reference takes them from the factorized network, so ``graph`` says nothing about them.
        overflow: Name of the first stage whose output overflows, for example in half precision, while the output of the
            original is finite. Then ``graph`` is the error in single precision, or NaN if the networks cannot be run in
            it. None if no stage overflows.
        loss_increase: How far the outputs are from the original's, in nats for one sample, by what the plan says that
            they mean. None if the plan was made without data, or there is only one sample.
    """

    graph: float
    end_to_end: float
    tolerance: float
    sites: tuple[SiteErrors, ...]
    changed: tuple[str, ...] = ()
    overflow: str | None = None
    loss_increase: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the network computed the same as the reference on these inputs, up to rounding.

        This says that the graph is correct. It says nothing about the approximation error, ``end_to_end``.
        """
        return self.graph <= self.tolerance and self.overflow is None

    def __str__(self) -> str:
        return self.table(terminal_width())

    def table(self, width: int | None = None) -> str:
        """Return the errors of the convolutions as a table, and those of the network below it.

        Args:
            width: Number of characters in a line. None breaks no line.

        Returns:
            The text.

        Raises:
            ArgumentError: ``width`` is less than 20.
        """
        columns = [Column("convolution", 0, least=16), Column("kernel", 2), Column("output", 1)]
        rows = [
            [site.path, f"{site.weight:.2e}", "" if site.output is None else f"{site.output:.2e}"]
            for site in self.sites
        ]
        notes = (
            f"{format_approximation_error(self.end_to_end)}{format_loss(self.loss_increase)}\n"
            f"{format_graph_check(self.graph, self.tolerance, self.changed, self.overflow)}\n"
            "The table has relative errors. kernel: of the composed kernel; may be large if calibration data showed "
            "that it matters little. output: of the convolution, on its input in the original."
        )
        return f"{Table(columns, rows).format(width)}\n\n{wrap_lines(notes, width)}"


def verify(
    original: nn.Module | ExportedProgram,
    factorized: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs | None = None,
) -> Verification:
    """Compare a factorized network with its original.

    Runs copies of both in evaluation mode, with reduced-precision matrix products (TF32) off. Neither is changed.

    Args:
        original: The network that was factorized.
        factorized: A network that fxfact made of ``original``. It may have been trained since.
        example_inputs: One call of both networks: a tensor, a tuple of positional arguments, or a mapping of keyword
            arguments. If one of the two is an ExportedProgram, its own example inputs are the default.

    Returns:
        The errors of every rewritten convolution, of the graph and end to end. See ``Verification``.

    Raises:
        ArgumentError: There are no example inputs.
        ArgumentTypeError: A network is neither a module nor an ExportedProgram.
        CaptureError: A network cannot be copied, or fails on these inputs.
        PlanError: ``factorized`` was not made by a plan, was changed since, or was made of another model.
        WeightError: A network computes NaN or Inf because of its own weights.
    """
    if example_inputs is None:
        programs = [network for network in (original, factorized) if isinstance(network, ExportedProgram)]
        if not programs:
            raise ArgumentError("verify compares outputs: pass example_inputs, one call of the two networks")
        example_inputs = inputs_of(programs[0])
    verified = _verify(original, factorized, example_inputs, may_be_trained=True)
    return replace(verified, loss_increase=_loss_increase(original, factorized, example_inputs))


@full_precision()
def _loss_increase(
    original: nn.Module | ExportedProgram, factorized: nn.Module | ExportedProgram, example_inputs: ExampleInputs
) -> float | None:
    """Return the divergence of the outputs, or None if the plan does not know what they mean."""
    parts = last_plan(factorized).outputs
    if not parts or samples_of(example_inputs) < 2:
        return None
    try:
        evaluator = DivergenceEvaluator(to_eval(copy_as_module(original)), [example_inputs], parts)
        return evaluator.divergence(to_eval(copy_as_module(factorized)))
    except CalibrationError:  # these inputs give outputs that cannot be measured
        return None


def check_rewrite(
    original: nn.Module | ExportedProgram, factorized: nn.Module | ExportedProgram, example_inputs: ExampleInputs
) -> None:
    """Raise VerificationError unless the network equals its original with the composed kernels on these inputs.

    The relative tolerance is that of ``Verification``. No other tensor may differ from the original's.
    """
    verified = _verify(original, factorized, example_inputs, may_be_trained=False)
    if verified.overflow is not None and not verified.graph > verified.tolerance:
        raise VerificationError(format_overflow(verified.overflow))
    if not verified.ok:
        cause = "This is a bug to report"
        if last_plan(factorized).capture == "trace":
            cause = (
                "Either tracing lost some of the model's Python (a branch on values), which capture='modules' keeps, "
                "or it is a bug to report"
            )
        raise VerificationError(
            f"the rewritten network differs from the original with the same kernels by {verified.graph:.2e} "
            f"(relative), more than the tolerance {verified.tolerance:.0e}, so its graph is wrong. {cause}."
        )


@full_precision()
def _verify(
    original: nn.Module | ExportedProgram,
    factorized: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs,
    *,
    may_be_trained: bool,
) -> Verification:
    for name, network in (("original", original), ("factorized", factorized)):
        if not isinstance(network, nn.Module | ExportedProgram):
            found = type(network).__name__
            raise ArgumentTypeError(f"{name} must be a torch.nn.Module or ExportedProgram, got {found}")
    plan, rewritten = last_plan(factorized), copy_as_module(factorized)
    prepared, kernels = prepare_original(original, plan), composed_kernels(rewritten, plan)
    site_errors = _SiteErrorMode(prepared, kernels)
    reference = with_kernels(alias_copy(prepared), kernels)  # copied before a run can change buffers
    original_output = _run(copy_as_module(original), example_inputs)
    with site_errors:
        preparation_error = relative_error(original_output, _run(prepared, example_inputs))
    changed = _adopt_changed_tensors(reference, rewritten, plan) if may_be_trained else ()
    expected, found = _run(reference, example_inputs), _run(rewritten, example_inputs)
    for role, network, output in (
        ("the original", prepared, original_output),
        ("the factorized network", rewritten, found),
    ):
        if not is_finite(output):
            check_finite_state(network, role)
    graph_error = max(relative_error(expected, found), preparation_error)
    tolerance = tolerance_for([expected, *site_errors.conv_dtypes.values(), *kernels.values()])
    overflow = None
    if is_finite(original_output) and not (graph_error <= tolerance and is_finite(found)):
        overflow = first_overflow(rewritten, plan, example_inputs)
    if overflow is not None:
        graph_error = single_precision_error(reference, rewritten, example_inputs)
    elif graph_error > tolerance:
        tolerance = max(tolerance, _SAFETY * _effect_of_rounding(reference, kernels, example_inputs, tolerance))
    return Verification(
        graph=graph_error,
        end_to_end=relative_error(original_output, found),
        tolerance=tolerance,
        sites=site_errors.errors,
        changed=changed,
        overflow=overflow,
    )


def _effect_of_rounding(
    reference: nn.Module, kernels: Mapping[str, Tensor], example_inputs: ExampleInputs, tolerance: float
) -> float:
    """Return how far the output moves, at most of a few trials, if all kernels change by a tenth of the tolerance.

    It usually moves by as much. If layers round their inputs, as quantized ones do, it moves by their steps.
    """
    expected, effects = _run(alias_copy(reference), example_inputs), []
    for size in (tolerance / 10, -tolerance / 10, tolerance / 30):
        moved = {path: kernel * (1 + size * seeded_randn(kernel.shape).to(kernel)) for path, kernel in kernels.items()}
        effects.append(relative_error(expected, _run(with_kernels(alias_copy(reference), moved), example_inputs)))
    return max(effects)


class _SiteErrorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Repeats every convolution and linear layer that uses a weight of the network with the composed kernel."""

    supports_higher_order_operators = True  # passed through unseen

    def __init__(self, network: nn.Module, kernels: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kernels = kernels
        self._weights = {path: conv_weight(network, path) for path in kernels}
        self._paths = StorageIndex(self._weights.items())
        self._squared_error: dict[str, float] = defaultdict(float)
        self._squared_norm: dict[str, float] = defaultdict(float)
        self._linear_layers = _LinearErrors(self._weights, kernels, self._add)
        self.conv_dtypes: dict[torch.dtype, Tensor] = {}  # an empty tensor for each dtype that convolutions return

    def __enter__(self) -> _SiteErrorMode:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._linear_layers.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        self._linear_layers.__exit__(*raised)  # type: ignore[no-untyped-call]
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        weight = args[1] if len(args) > 1 and looks_like_conv(func) else None
        if weight is not None:
            self.conv_dtypes[output.dtype] = output.new_empty(0)
        path = self._paths.name_of(weight) if isinstance(weight, Tensor) else None
        if path is not None and isinstance(weight, Tensor):
            other = func(args[0], self._kernels[path].to(weight.dtype), *args[2:], **(kwargs or {}))
            self._add(path, output, other)
        return output

    def _add(self, path: str, output: Tensor, other: Tensor) -> None:
        """Add one call: its output, and that with the composed kernel."""
        self.conv_dtypes[output.dtype] = output.new_empty(0)
        self._squared_error[path] += float((other - output).double().square().sum())
        self._squared_norm[path] += float(output.double().square().sum())

    @property
    def errors(self) -> tuple[SiteErrors, ...]:
        """The errors of every site."""
        found = []
        for path, kernel in self._kernels.items():
            weight = relative_error(self._weights[path], kernel)
            total = self._squared_norm.get(path)
            output = (self._squared_error[path] / total) ** 0.5 if total else None
            found.append(SiteErrors(path=path, weight=weight, output=output))
        return tuple(found)


class _LinearErrors(LinearCallMode):
    """Repeats every linear layer that uses one of the weights with the composed kernel."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        kernels: Mapping[str, Tensor],
        add: Callable[[str, Tensor, Tensor], None],
    ) -> None:
        super().__init__((path, weight) for path, weight in weights.items() if weight.ndim == 2)
        self._weights, self._kernels, self._add = weights, kernels, add

    def on_linear(self, name: str, call: ConvCall, run: Callable[[], Tensor]) -> Tensor:
        """Compute the layer twice."""
        output = run()
        is_turned = call.weight.stride() != self._weights[name].stride()  # than the weight that the network holds
        kernel = self._kernels[name].T if is_turned != call.transposed else self._kernels[name]
        self._add(name, output, functional.linear(call.input, kernel.to(call.weight.dtype), call.bias))
        return output


def _adopt_changed_tensors(reference: nn.Module, factorized: nn.Module, plan: Plan) -> tuple[str, ...]:
    """Put the factorized network's biases, norms and other tensors into the reference, and return the changed names.

    Kernels of rewritten convolutions are left out.
    """
    held: dict[str, Tensor | None] = dict(chain(factorized.named_parameters(), factorized.named_buffers()))
    for decision in plan.rewrites:
        held[f"{decision.path}.bias"] = getattr(stages_of(factorized, decision)[-1], "bias", None)
        held |= dict.fromkeys((decision.path, f"{decision.path}.weight"))
    changed = []
    for prefix, module in reference.named_modules():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                path = f"{prefix}.{name}".removeprefix(".")
                new = held.get(path)
                if new is not None and _has_changed(path, old, new):
                    changed.append(path)
                    store[name] = nn.Parameter(new, requires_grad=False) if store is module._parameters else new
    return tuple(changed)


def _has_changed(path: str, old: Tensor | None, new: Tensor) -> bool:
    """Whether two floating-point tensors of one shape differ by more than rounding. Raises CaptureError."""
    if old is None or not (old.is_floating_point() or old.is_complex()):
        return False
    if not (old.is_nested or new.is_nested) and old.shape != new.shape:
        return False
    ones, others = plain_tensors(old.detach()), plain_tensors(new.detach())
    if [(one.shape, one.dtype) for one in ones] != [(other.shape, other.dtype) for other in others]:
        return True
    pairs = zip(ones, others, strict=True)
    try:
        return any(relative_error(one, other) > tolerance_for(one) * _TENSOR_SHARE for one, other in pairs)
    except Exception as error:  # operators of a tensor class may raise anything
        raise CaptureError(
            f"{path}: tensors of the class {type(old).__name__} cannot be compared: {reason_of(error)}. Define "
            "__tensor_flatten__ and __tensor_unflatten__ in the class, or verify before such tensors are put in."
        ) from error


def _run(network: nn.Module, example_inputs: ExampleInputs) -> Any:
    try:
        return run_model(to_eval(network), example_inputs)
    except Exception as error:
        raise CaptureError(f"{type(network).__name__} fails on these inputs: {reason_of(error)}") from error
