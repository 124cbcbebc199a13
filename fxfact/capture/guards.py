"""Guards that protect the model's tensors while its Python code runs on a private copy."""

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
    """Raises CaptureError before an operator writes to a parameter.

    Args:
        network: a private copy of the model. Its parameters use the model's memory.
    """

    supports_higher_order_operators = True  # such as torch.cond, which write to nothing themselves

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._network = network
        self._before = _parameter_identities(network)
        self._names = {storage: name for name, (_, storage) in self._before.items() if storage is not None}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for index, name in _written_arguments(func):
            for tensor in tree_leaves(args[index] if index < len(args) else kwargs.get(name)):
                if isinstance(tensor, Tensor) and (storage := storage_of(tensor)) in self._names:
                    raise _changed_error(self._names[storage])
        return func(*args, **kwargs)

    def check(self) -> None:
        """Raise CaptureError if a parameter was replaced, or was given other memory."""
        now = _parameter_identities(self._network)
        for name in self._before | now:
            if self._before.get(name) != now.get(name):
                raise _changed_error(name)


def _parameter_identities(network: nn.Module) -> dict[str, tuple[int, int | None]]:
    return {name: (id(tensor), storage_of(tensor)) for name, tensor in network.named_parameters()}


def _changed_error(name: str) -> CaptureError:
    return CaptureError(f"{name}: forward changes this parameter, which a factorized network could not do.")


@cache
def _written_arguments(func: Callable[..., Any]) -> tuple[tuple[int, str], ...]:
    """Return the positions and names of the arguments that an operator writes to."""
    if isinstance(func, HigherOrderOperator):
        return ()
    arguments = enumerate(func._schema.arguments)  # type: ignore[attr-defined]
    return tuple((k, a.name) for k, a in arguments if a.alias_info is not None and a.alias_info.is_write)


class OriginalTensorGuard(TorchFunctionMode):
    """Raises CaptureError before an operator uses a tensor object of the model itself.

    A private copy has tensor objects of its own. Code that still reaches those of the model has kept them where copies
    do not follow: in a closure, or in a method replaced on one object.

    Args:
        model: the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        named = (*model.named_parameters(), *model.named_buffers())
        self._names = {id(tensor): name for name, tensor in named}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = () if func is Tensor.__deepcopy__ else tree_leaves((args, kwargs))  # the memo of a copy has all
        for value in values:
            if isinstance(value, Tensor) and id(value) in self._names:
                raise CaptureError(
                    f"{self._names[id(value)]}: forward uses this tensor through a closure, or a method replaced on "
                    "one object, which a copy of the model cannot follow"
                )
        return func(*args, **(kwargs or {}))
