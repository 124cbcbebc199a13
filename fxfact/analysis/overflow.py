"""Finds the stage whose output overflows, and compares networks in single precision instead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fxfact.analysis.reference import stages_of
from fxfact.capture import ExampleInputs, run_model
from fxfact.planning import Plan
from fxfact.utils import StorageIndex, alias_copy, plain_tensors_of, relative_error, to_eval


def is_finite(output: Any) -> bool:
    """Return whether the floating-point tensors in an output have neither NaN nor Inf."""
    tensors = [tensor for tensor in plain_tensors_of(output) if tensor.is_floating_point()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def first_overflow(network: nn.Module, plan: Plan, example_inputs: ExampleInputs) -> str | None:
    """Return the name of the first stage in a run whose output is not finite although its input is, or None."""
    names = {id(module): name for name, module in network.named_modules()}
    stages = [stage for decision in plan.rewrites for stage in stages_of(network, decision)]
    mode = _OverflowMode({names[id(stage)]: stage.weight for stage in stages if isinstance(stage.weight, Tensor)})
    with mode:
        run_model(to_eval(network), example_inputs)
    return mode.found


def single_precision_error(expected: nn.Module, found: nn.Module, example_inputs: ExampleInputs) -> float:
    """Return the relative error between two networks in single precision.

    It is NaN if they cannot be run in single precision or overflow nevertheless, as networks that convert tensors.
    """

    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    try:
        inputs = tree_map(widen, example_inputs)
        outputs = [run_model(to_eval(alias_copy(network).float()), inputs) for network in (expected, found)]
    except Exception:  # a network may demand its own dtype
        return math.nan
    return relative_error(*outputs) if is_finite(outputs) else math.nan


class _OverflowMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches every operation that uses one of the weights, or a copy of it in another dtype, as autocast makes."""

    supports_higher_order_operators = True  # passed through unseen

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = StorageIndex(weights.items())
        self._copies: list[Tensor] = []  # held, so that no other tensor gets their memory
        self.found: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
        name = next(filter(None, map(self._names.name_of, tensors)), None)
        if name is not None and func is torch.ops.aten._to_copy.default:
            self._names.add(name, output)
            self._copies.append(output)
        if name is not None and self.found is None and is_finite(tensors) and not is_finite(output):
            self.found = name
        return output
