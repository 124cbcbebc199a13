"""A private copy of a model that is used again as long as running it changes nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import Enum
from types import BuiltinFunctionType, EllipsisType, FunctionType, MethodType, NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxfact.utils import storage_of

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
        return [value._version, storage_of(value), value.requires_grad, grad, value._backward_hooks, vars(value)]
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
