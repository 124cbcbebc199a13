"""Intercepts the linear layers that a network computes, however it spells them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxfact.conv.functional import ConvCall, matrix_of, read_call
from fxfact.utils import StorageIndex


class LinearCallMode(TorchFunctionMode):
    """Calls ``on_linear`` in place of every linear layer that uses one of the weights.

    Operators below do not tell: a linear layer is a matrix product there, and its gradients are others. Inside the
    transforms of ``torch.func`` nothing is intercepted.

    Args:
        weights: The weights with their names. A transpose of a weight, or another view, counts as the weight.
    """

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        self._names = StorageIndex(weights)

    @abstractmethod
    def on_linear(self, name: str, call: ConvCall, run: Callable[[], Tensor]) -> Tensor:
        """Return the output of a linear layer.

        Args:
            name: The name of its weight.
            call: The arguments of the call. The weight is a matrix.
            run: Computes the output.
        """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = read_call(func, args, kwargs or {})
        is_linear = call is not None and call.is_linear and torch._C._functorch.peek_interpreter_stack() is None
        weight = matrix_of(call.weight) if call is not None and is_linear else None
        name = None if weight is None else self._names.name_of(weight)
        if call is None or name is None:
            return func(*args, **(kwargs or {}))
        return self.on_linear(name, replace(call, weight=weight), partial(func, *args, **(kwargs or {})))
