"""What watches a private copy while the model's own Python runs on the model's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxfact.errors import CaptureError
from fxfact.utils import storage_of


class ParameterGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises CaptureError, before it happens, where anything inside writes to a parameter of ``network``."""

    supports_higher_order_operators = True  # the branches of torch.cond and its like, which write to nothing

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._network = network
        self._held = _held(network)
        self._names = {storage: name for name, (_, storage) in self._held.items() if storage is not None}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for index, name in _written_arguments(func):
            for tensor in tree_leaves(args[index] if index < len(args) else kwargs.get(name)):
                if isinstance(tensor, Tensor) and (storage := storage_of(tensor)) in self._names:
                    raise _changed(self._names[storage])
        return func(*args, **kwargs)

    def check(self) -> None:
        """Raise CaptureError where a parameter is another object, or has other memory, than at the beginning."""
        now = _held(self._network)
        for name in self._held | now:
            if self._held.get(name) != now.get(name):
                raise _changed(name)


def _held(network: nn.Module) -> dict[str, tuple[int, int | None]]:
    return {name: (id(tensor), storage_of(tensor)) for name, tensor in network.named_parameters()}


def _changed(name: str) -> CaptureError:
    return CaptureError(f"{name}: forward changes this parameter, which a factorized network would no longer do.")


@cache
def _written_arguments(func: Callable[..., Any]) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operator writes to."""
    if isinstance(func, HigherOrderOperator):
        return ()
    arguments = enumerate(func._schema.arguments)  # type: ignore[attr-defined]
    return tuple((k, a.name) for k, a in arguments if a.alias_info is not None and a.alias_info.is_write)


class OriginalTensorGuard(TorchFunctionMode):
    """Raises CaptureError, before it happens, where anything inside uses a tensor of ``model`` itself.

    A copy shares the memory of parameters, not the tensors; who finds the tensors themselves has kept them, or their
    modules, where copying does not follow: in a closure, or in a method replaced on one object.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        named = (*model.named_parameters(), *model.named_buffers())
        self._names = {id(tensor): name for name, tensor in named}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = () if func is Tensor.__deepcopy__ else tree_leaves((args, kwargs))  # its memo holds everything
        for value in values:
            if isinstance(value, Tensor) and id(value) in self._names:
                raise CaptureError(
                    f"{self._names[id(value)]}: forward uses this tensor through a closure, or a method replaced on "
                    "one object, which a copy of the model cannot follow"
                )
        return func(*args, **(kwargs or {}))
