"""Keeps a model unchanged while its Python code runs: a private copy, and guards for the tensors that it shares."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import cache
from types import BuiltinFunctionType, EllipsisType, FunctionType, MethodType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxfact.errors import CaptureError
from fxfact.utils import storages_of

_PYTHON = (NoneType, bool, int, float, complex, str, bytes, type, Enum, EllipsisType, FunctionType, BuiltinFunctionType)
_IMMUTABLE = (*_PYTHON, torch.dtype, torch.device, torch.layout, torch.memory_format)
_COMMON = frozenset({NoneType, bool, int, float, str})  # of _IMMUTABLE, for a quick test
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set})


class PrivateCopy:
    """A private copy of a model, which is made again only if it is no longer in the state of the model.

    Args:
        make: a function that copies the model.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self._make = make
        self._copy: nn.Module | None = None
        self._state: list[Any] | None = None

    def get(self) -> nn.Module:
        """Return a copy in the state of the model. The next call returns the same copy if it is unchanged by then."""
        if self._copy is None or not _is_same(self._state, state_of(self._copy)):
            self._copy = self._make()
            self._state = state_of(self._copy)
        return self._copy

    def discard(self) -> None:
        """Do not return the present copy again, because the caller keeps it."""
        self._copy = None

    def take(self) -> nn.Module:
        """Return a copy in the state of the model that the caller keeps and may change."""
        network = self.get()
        self.discard()
        return network


def state_of(module: nn.Module) -> list[Any] | None:
    """Return all values in a module that running it may change, or None if some object in it cannot be inspected.

    The function visits what ``copy.deepcopy`` would copy. Tensors and modules count as objects, with the version of
    their memory. Everything else counts by value.
    """
    try:
        return list(_values(module))
    except Exception:  # an object that cannot be copied, or of a class with rules of its own
        return None


def _values(module: nn.Module) -> Iterator[Any]:
    waiting: list[Any] = [module]
    visited: dict[int, Any] = {}  # keeps the objects, so that no id is used twice
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if isinstance(value, _IMMUTABLE):
            yield value
        elif kind in _CONTAINERS and not value:
            yield kind
        elif id(value) not in visited:
            visited[id(value)] = value
            parts = _parts(value)
            yield value if isinstance(value, Tensor | nn.Module) else kind
            yield len(parts)
            for part in parts:  # the common ones at once, which saves time
                if type(part) in _COMMON:
                    yield part
                else:
                    yield ...
                    waiting.append(part)


def _parts(value: Any) -> list[Any]:
    """Return the objects that an object consists of. Raises an exception if that is unknown."""
    if isinstance(value, nn.Module) and not isinstance(value, torch.jit.ScriptModule):
        return [*vars(value), *vars(value).values()]
    if isinstance(value, Tensor):
        grad = value.grad if value.is_leaf else None
        return [value._version, storages_of(value), value.requires_grad, grad, value._backward_hooks, vars(value)]
    if isinstance(value, dict | list | tuple | set | frozenset):
        parts = [*value, *value.values()] if isinstance(value, dict) else [*value]
        return [*parts, getattr(value, "__dict__", None) or None]
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return [value.dtype.str, value.shape, value.tobytes()]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if hasattr(type(value), "__deepcopy__"):
        raise TypeError(f"{type(value).__name__} is copied in a way of its own")
    reduced = value.__reduce_ex__(4)
    return [] if isinstance(reduced, str) else [list(part) if hasattr(part, "__next__") else part for part in reduced]


def _is_same(before: list[Any] | None, after: list[Any] | None) -> bool:
    if before is None or after is None or len(before) != len(after):
        return False
    return all(
        one is other or (isinstance(one, _IMMUTABLE) and type(one) is type(other) and one == other)
        for one, other in zip(before, after, strict=True)
    )


class ParameterChangedError(CaptureError):
    """forward changes the parameter ``name``, so no front end can take the model."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name}: forward changes this parameter, which a factorized network could not do. Move the change out of "
            "forward, for example into the training loop."
        )
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name,)


class ParameterGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises ParameterChangedError before an operator writes to a parameter.

    Args:
        network: a private copy of the model. Its parameters use the model's memory.
    """

    supports_higher_order_operators = True  # such as torch.cond, which write to nothing themselves

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._network = network
        self._before = _parameter_identities(network)
        self._error: ParameterChangedError | None = None
        self._names = {storage: name for name, (_, storages, _) in self._before.items() for storage in storages}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for index, name in written_arguments(func):
            for tensor in tree_leaves(args[index] if index < len(args) else kwargs.get(name)):
                for storage in storages_of(tensor) if isinstance(tensor, Tensor) else ():
                    if storage in self._names:
                        self._error = ParameterChangedError(self._names[storage])
                        raise self._error
        return func(*args, **kwargs)

    def check(self) -> None:
        """Raise ParameterChangedError if a parameter was replaced, or its memory or its requires_grad was.

        Raise it also if an operator was to write to a parameter, in case that the code inside has caught the error.
        """
        if self._error is not None:
            raise self._error
        now = _parameter_identities(self._network)
        for name in self._before | now:
            if self._before.get(name) != now.get(name):
                raise ParameterChangedError(name)


def _parameter_identities(network: nn.Module) -> dict[str, tuple[int, tuple[int, ...], bool]]:
    return {name: (id(p), storages_of(p), p.requires_grad) for name, p in network.named_parameters()}


@cache
def written_arguments(func: Callable[..., Any]) -> tuple[tuple[int, str], ...]:
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
