"""Graph and mathematics told apart: is a rewritten network what its own kernels say, and how near are these?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._python_dispatch import TorchDispatchMode

from fxfact.capture import ExampleInputs, inputs_of, reason_of, run_model
from fxfact.conv import compose_modules, looks_like_conv, to_torch
from fxfact.errors import ArgumentError, ArgumentTypeError, CaptureError, PlanError, VerificationError
from fxfact.graph import get_tensor
from fxfact.passes import capture_as_planned, last_plan, run_passes
from fxfact.planning import Decision, Plan
from fxfact.utils import (
    StorageIndex,
    alias_copy,
    full_precision,
    no_reduced_precision,
    relative_error,
    to_eval,
    tolerance_for,
)

_ROUNDING = 0.01  # of what it may do to an output: to a tensor


@dataclass(frozen=True, kw_only=True)
class SiteErrors:
    """One rewritten convolution: how far its kernel, and its output on the original's own input, are from the original.

    Both relative; ``output`` is None where the run did not show it.
    """

    path: str
    weight: float
    output: float | None


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How far a factorized network is from its original on some inputs, all errors relative: ‖found − expected‖ /
    ‖expected‖.

    ``graph``: from the original with its kernels replaced by the composed ones, or of that original, where it is in
    the form for inference, from itself; only rounding, if the rewrite is right.
    ``end_to_end``: from the original itself, which is what the approximation costs. ``sites`` has the convolutions.
    ``changed`` names other tensors that are not the original's any more, as after ``repair``, ``recover`` and training:
    ``graph`` is with those of the network as well.
    """

    graph: float
    end_to_end: float
    tolerance: float
    sites: tuple[SiteErrors, ...]
    changed: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the network computes what its own kernels say, within rounding."""
        return self.graph <= self.tolerance

    def __str__(self) -> str:
        rows = [
            [site.path, f"{site.weight:.2e}", "" if site.output is None else f"{site.output:.2e}"]
            for site in self.sites
        ]
        table = tabulate(rows, ["convolution", "kernel", "output"], disable_numparse=True)
        verdict = "right" if self.ok else f"WRONG: more than {self.tolerance:.0e}"
        more = f"changed since, and taken from the network: {', '.join(self.changed)}\n" if self.changed else ""
        return (
            f"{table}\n\ngraph {self.graph:.2e} ({verdict}), end to end {self.end_to_end:.2e}\n{more}"
            "relative errors: of each kernel (large where data said that it does not matter), of its output on the "
            "original's\nown input; of the graph from the original with the same kernels, and from the original itself"
        )


def verify(
    original: nn.Module | ExportedProgram,
    factorized: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs | None = None,
) -> Verification:
    """Compare a factorized network with its original, in evaluation mode, on copies.

    ``example_inputs`` may be left out where one of the two is an ExportedProgram, which brings its own. Raises
    ArgumentError, ArgumentTypeError, PlanError where ``factorized`` was not made by a plan, CaptureError where one of
    them does not run.
    """
    if example_inputs is None:
        programs = [given for given in (original, factorized) if isinstance(given, ExportedProgram)]
        if not programs:
            raise ArgumentError("verify compares outputs: pass example_inputs, a call of the two networks")
        example_inputs = inputs_of(programs[0])
    return _verified(original, factorized, example_inputs, trained=True)


@full_precision()
def _verified(
    original: nn.Module | ExportedProgram,
    factorized: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs,
    *,
    trained: bool,
) -> Verification:
    """``trained``: what else the network holds may have changed since it was made."""
    for name, given in (("original", original), ("factorized", factorized)):
        if not isinstance(given, nn.Module | ExportedProgram):
            raise ArgumentTypeError(f"{name} must be a torch.nn.Module or ExportedProgram, got {type(given).__name__}")
    plan, network = last_plan(factorized), plain_copy(factorized)
    base, kernels = prepared(original, plan), _kernels(network, plan)
    sites = _SiteErrors(base, kernels)
    own = _run(plain_copy(original), example_inputs)
    with sites:
        prepared_itself = relative_error(own, _run(base, example_inputs))
    reference = with_kernels(prepared(original, plan), kernels)
    changed = _taken_over(reference, network, plan) if trained else ()
    expected, found = _run(reference, example_inputs), _run(network, example_inputs)
    return Verification(
        graph=max(relative_error(expected, found), prepared_itself),
        end_to_end=relative_error(own, found),
        tolerance=tolerance_for([expected, *sites.outputs.values(), *kernels.values()]),
        sites=sites.errors,
        changed=changed,
    )


def with_composed_kernels(original: nn.Module | ExportedProgram, factorized: nn.Module | ExportedProgram) -> nn.Module:
    """A copy of the original, keeping its own Python, with the kernel of every site that the last plan rewrote replaced
    by what the stages in ``factorized`` compose to. Raises PlanError.

    Of an ExportedProgram its module, and of weights that a graph computes the graph, are what the kernels are put into.
    """
    plan = last_plan(factorized)
    return with_kernels(prepared(original, plan), _kernels(plain_copy(factorized), plan))


def check_rewrite(
    original: nn.Module | ExportedProgram, factorized: nn.Module | ExportedProgram, example_inputs: ExampleInputs
) -> None:
    """Raise VerificationError unless the network equals its original with the composed kernels on these inputs.

    The tolerance is relative: 1e-10 in double, 1e-4 in single precision.
    """
    verified = _verified(original, factorized, example_inputs, trained=False)
    if not verified.ok:
        raise VerificationError(
            f"the rewritten network differs from the original with the same kernels by {verified.graph:.2e} "
            f"(relative), more than {verified.tolerance:.0e}: its graph is wrong. Either tracing lost some of the "
            "model's Python (a branch on values), or this is a bug to report."
        )


class _SiteErrors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Convolves a second time with the composed kernel wherever one of these weights is convolved with."""

    supports_higher_order_operators = True  # which it does not look into

    def __init__(self, network: nn.Module, kernels: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kernels = kernels
        self._weights = {path: _weight_of(network, path) for path in kernels}
        self._paths = StorageIndex(self._weights.items())
        self._missed: dict[str, float] = defaultdict(float)
        self._total: dict[str, float] = defaultdict(float)
        self.outputs: dict[torch.dtype, Tensor] = {}  # an empty one for each precision of convolutions

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        weight = args[1] if len(args) > 1 and looks_like_conv(func) else None
        if weight is not None:
            self.outputs[output.dtype] = output.new_empty(0)
        path = self._paths.name_of(weight) if isinstance(weight, Tensor) else None
        if path is not None and isinstance(weight, Tensor):
            other = func(args[0], self._kernels[path].to(weight.dtype), *args[2:], **(kwargs or {}))
            self._missed[path] += float((other - output).double().square().sum())
            self._total[path] += float(output.double().square().sum())
        return output

    @property
    def errors(self) -> tuple[SiteErrors, ...]:
        """Of every site."""
        found = []
        for path, kernel in self._kernels.items():
            weight = relative_error(self._weights[path], kernel)
            total = self._total.get(path)
            output = (self._missed[path] / total) ** 0.5 if total else None
            found.append(SiteErrors(path=path, weight=weight, output=output))
        return tuple(found)


def prepared(original: nn.Module | ExportedProgram, plan: Plan) -> nn.Module:
    """A copy of the original for what a plan made to be compared with: its computed weights folded and in the form for
    inference, where the plan says so, but with all of its convolutions.
    """
    if not (plan.fold_weights or plan.inference_passes or isinstance(original, ExportedProgram)):
        return alias_copy(original)
    kept = [name for name in plan.inference_passes if name not in {"merge_pointwise", "pointwise_linear", "onednn"}]
    return run_passes(to_eval(capture_as_planned(original, plan).network), kept)


def plain_copy(network: nn.Module | ExportedProgram) -> nn.Module:
    """A private copy; of an exported program of its module."""
    return alias_copy(network.module(check_guards=False) if isinstance(network, ExportedProgram) else network)


def _kernels(network: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """What the stages at every rewritten path compose to, read from the network; in PyTorch's layout."""
    found = {}
    with torch.no_grad():
        for decision in plan.rewrites:
            assert decision.spec is not None
            stages = stages_of(network, decision)
            with no_reduced_precision(cast(Tensor, stages[0].weight).device):
                kernel = compose_modules(decision.stages, stages)
            found[decision.path] = to_torch(decision.spec, kernel)
    return found


def stages_of(network: nn.Module, decision: Decision) -> list[nn.Module]:
    """The modules that took a convolution's place. Raises PlanError where they are not those that the plan made."""
    try:
        children = network.get_submodule(decision.path).children()
    except AttributeError as error:
        raise PlanError(f"{decision.path}: the plan put a chain here, and the network has nothing") from error
    stages = [stage for stage in children if isinstance(getattr(stage, "weight", None), Tensor)]
    planned = [(spec, torch.empty(spec.weight_shape, device="meta")) for spec in decision.stages]
    if [stage.weight.shape for stage in stages] != [to_torch(spec, weight).shape for spec, weight in planned]:
        raise PlanError(
            f"{decision.path}: the plan says {len(decision.stages)} stages, and they are not there any more as it made "
            "them. fxfact.for_inference merges 1×1 convolutions: pass the network from before that."
        )
    return stages


def _weight_name(network: nn.Module, path: str) -> str:
    """Of the convolution at a path, which is the path itself where a bare parameter is convolved with."""
    return path if get_tensor(network, path) is not None else f"{path}.weight"


def _weight_of(network: nn.Module, path: str) -> Tensor:
    weight = get_tensor(network, _weight_name(network, path))
    if weight is None:
        raise PlanError(f"{path}: the factorized network has a convolution here, the original has none")
    return weight


def with_kernels(network: nn.Module, kernels: Mapping[str, Tensor]) -> nn.Module:
    """The private copy given, these kernels, in PyTorch's layout, put in at these paths."""
    for path, kernel in kernels.items():
        owner, _, name = _weight_name(network, path).rpartition(".")
        module = network.get_submodule(owner)
        for store in (module._parameters, module._buffers, vars(module)):
            store.pop(name, None)
        module.register_parameter(name, nn.Parameter(kernel, requires_grad=False))
    return network


def _taken_over(reference: nn.Module, network: nn.Module, plan: Plan) -> tuple[str, ...]:
    """Give the reference what the network holds otherwise, but for the kernels, such as biases and norms; the names."""
    held: dict[str, Tensor | None] = dict(chain(network.named_parameters(), network.named_buffers()))
    for decision in plan.rewrites:
        held[f"{decision.path}.bias"] = getattr(stages_of(network, decision)[-1], "bias", None)
        held |= dict.fromkeys((decision.path, f"{decision.path}.weight"))
    changed = []
    for place, module in reference.named_modules():
        for store in (module._parameters, module._buffers):
            for name, own in store.items():
                path = f"{place}.{name}".removeprefix(".")
                other = held.get(path)
                if other is not None and _differ(own, other):
                    changed.append(path)
                    store[name] = nn.Parameter(other, requires_grad=False) if store is module._parameters else other
    return tuple(changed)


def _differ(own: Tensor | None, other: Tensor) -> bool:
    """By more than rounding, in numbers."""
    if own is None or own.shape != other.shape or not (own.is_floating_point() or own.is_complex()):
        return False
    return relative_error(own, other) > tolerance_for(own) * _ROUNDING


def _run(network: nn.Module, example_inputs: ExampleInputs) -> Any:
    try:
        return run_model(to_eval(network), example_inputs)
    except Exception as error:
        raise CaptureError(f"{type(network).__name__} fails on these inputs: {reason_of(error)}") from error
