"""The result of a trace: a graph module that keeps plain attributes of the model, and refuses writes without effect."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from enum import Enum
from types import NoneType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import reduce_graph_module

from fxfact.capture.attribute_reads import MISSING, internal_names, own_classes
from fxfact.errors import CaptureError

_PLAIN = (
    NoneType,
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    Enum,
    range,
    frozenset,
    torch.dtype,
    torch.device,
    torch.Size,
)
_READ, _KEPT, _CLASS = "_read_by_forward", "_kept_attributes", "_traced_class"
_RECORDS = (_READ, _KEPT, _CLASS)


class LostAttributeError(CaptureError, AttributeError):
    """An attribute of the model that its graph does not have."""


class _TracedAttributes(nn.Module):
    """Refuses to set an attribute that forward had read when it was traced."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self).get(_READ, ()) and not _is_same(vars(self).get(name, MISSING), value):
            raise CaptureError(_explain(self, name, "setting it now has no effect"))
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self).get(_READ, ()):
            raise CaptureError(_explain(self, name, "deleting it now has no effect"))
        super().__delattr__(name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in vars(self).get(_READ, ()):
                raise LostAttributeError(_explain(self, name, "the graph does not have it")) from None
            raise


class TracedContainer(_TracedAttributes):
    """The place of a module that was traced into. It holds the modules and parameters that the graph uses."""


class TracedGraphModule(_TracedAttributes, fx.GraphModule):
    """The graph of a model. Copies and pickles of it keep the attributes of the model."""

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedGraphModule:
        """Return a deep copy with the kept attributes."""
        copied = cast(TracedGraphModule, super().__deepcopy__(memo))
        vars(copied).update(copy.deepcopy(_own_attributes(self), memo))
        return copied

    def __copy__(self) -> TracedGraphModule:
        """Return a copy that shares the leaf modules and the kept attributes."""
        copied = TracedGraphModule(self, self.graph, type(self).__name__)
        copied.meta = self.meta
        places = dict(copied.named_modules())
        for path, module in self.named_modules():
            if isinstance(module, _TracedAttributes) and path in places:
                places[path].__dict__.update(_own_attributes(module))
                if path:
                    places[path].__class__ = TracedContainer
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as ``fx.GraphModule`` does."""
        _, arguments = super().__reduce__()
        return _unpickle, arguments


def _unpickle(body: dict[str, Any], import_block: str) -> TracedGraphModule:
    plain = reduce_graph_module(body, import_block)
    traced = TracedGraphModule.__new__(TracedGraphModule)
    type(traced).__name__ = type(plain).__name__
    vars(traced).update({name: value for name, value in vars(plain).items() if name != "_graph"})
    vars(traced).update({name: body[name] for name in (*_RECORDS, *body.get(_KEPT, ())) if name in body})
    traced.graph = cast(fx.Graph, plain.graph)
    return traced


def keep_attributes(network: fx.GraphModule, model: nn.Module, read: Mapping[str, Mapping[str, Any]]) -> None:
    """Keep the plain attributes of a model on its graph module, and guard those that forward has read.

    Values are plain if they consist of numbers, strings, and lists, tuples and dicts of them; tensors and NumPy arrays
    are kept if forward has not read them. Lists and dicts that forward has read cannot be changed either.

    Args:
        network: the graph module that was made of ``model``.
        model: the private copy that was traced.
        read: the attributes that forward has read, by the path of the module.
    """
    copier = _PlainCopier(read)
    places = dict(network.named_modules())
    for path, module in model.named_modules():
        place = places.get(path)
        if path and type(place) is not nn.Module:
            continue
        assert place is not None
        if path:
            place.__class__ = TracedContainer
        held = {*place._modules, *place._parameters, *place._buffers}
        names = {name: value for name, value in read.get(path, {}).items() if name not in held}
        kept: dict[str, Any] = {}
        for name, value in {**_attributes(module), **names}.items():
            if name in names or not (name.startswith("_") or hasattr(place, name)):
                kept |= copier.copied(name, value, is_read=name in names)
        place.__dict__.update(kept)
        place.__dict__.update({_READ: frozenset(names), _KEPT: tuple(kept), _CLASS: type(module).__name__})


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    names = (*_RECORDS, *vars(module).get(_KEPT, ()))
    return {name: vars(module)[name] for name in names if name in vars(module)}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module and of its own classes that are no methods."""
    found: dict[str, Any] = {}
    for kind in reversed(own_classes(module)):
        found |= {name: value for name, value in vars(kind).items() if not hasattr(type(value), "__get__")}
    found |= vars(module)
    return {name: value for name, value in found.items() if name not in internal_names() and not name.startswith("__")}


def _explain(module: nn.Module, name: str, consequence: str) -> str:
    return (
        f"{name}: the forward of {vars(module).get(_CLASS)} read this attribute when it was traced. The graph keeps "
        f"the effect of the value, so {consequence}. Factorize with capture='modules', which keeps forward."
    )


def _is_same(old: Any, new: Any) -> bool:
    return type(old) is type(new) and isinstance(old, _PLAIN) and bool(old == new)


class _NotPlainError(Exception):
    pass


class _PlainCopier:
    """Copies plain values, and makes what forward has read unchangeable, wherever else it is held."""

    def __init__(self, read: Mapping[str, Mapping[str, Any]]) -> None:
        self._read = {
            id(value) for values in read.values() for value in values.values() if not isinstance(value, _PLAIN)
        }

    def copied(self, name: str, value: Any, *, is_read: bool) -> dict[str, Any]:
        """Return the name and the copy of the value. Return nothing if the value is not plain."""
        try:
            return {name: self._copy(value, is_read, depth=0)}
        except _NotPlainError:
            return {}

    def _copy(self, value: Any, is_read: bool, depth: int) -> Any:
        is_read, kind = is_read or id(value) in self._read, type(value)
        if isinstance(value, _PLAIN):
            return value
        if depth == 20:  # a list that holds itself
            raise _NotPlainError
        if kind in (list, tuple):
            items = [self._copy(item, is_read, depth + 1) for item in value]
            return tuple(items) if kind is tuple else ReadOnlyList(items) if is_read else items
        if kind is dict:
            pairs = {self._copy(key, is_read, depth + 1): self._copy(value[key], is_read, depth + 1) for key in value}
            return ReadOnlyDict(pairs) if is_read else pairs
        is_array = isinstance(value, Tensor | np.ndarray) and not isinstance(value, nn.Parameter)
        if is_read or not (is_array or kind is set):
            raise _NotPlainError
        return copy.deepcopy(value) if kind is set else value


def _refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise CaptureError(
        "forward read this list or dict when it was traced. The graph keeps the effect of the values, so changing them "
        "now has no effect. Factorize with capture='modules', which keeps forward."
    )


class ReadOnlyList(list[Any]):
    """A list that cannot be changed. Copies made by ``list`` can."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy by the constructor, without appending."""
        return ReadOnlyList, (list(self),)


class ReadOnlyDict(dict[Any, Any]):
    """A dict that cannot be changed. Copies made by ``dict`` can."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy by the constructor, without setting items."""
        return ReadOnlyDict, (dict(self),)


_MUTATORS = [
    "__setitem__",
    "__delitem__",
    "__iadd__",
    "__imul__",
    "__ior__",
    "append",
    "extend",
    "insert",
    "remove",
    "pop",
]
_MUTATORS += ["popitem", "clear", "sort", "reverse", "update", "setdefault"]
for _kind in (ReadOnlyList, ReadOnlyDict):
    for _name in _MUTATORS:
        if hasattr(_kind, _name):
            setattr(_kind, _name, _refuse)
