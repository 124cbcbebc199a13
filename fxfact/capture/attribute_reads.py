"""Records which attributes of modules forward reads during a trace, and finds the members that a graph would lose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from threading import get_ident
from typing import Any

from torch import nn

MISSING = object()  # the value of an attribute that does not exist, which forward may ask for with hasattr()
_WITHOUT_EFFECT = ("forward", "extra_repr")  # methods of nn.Module that a graph replaces, or that only describe


class AttributeReads:
    """Records the attributes of modules that are read while torch.fx traces them.

    A graph keeps what forward did with their values. Setting one of them later would have no effect.

    Attributes:
        values: for each module, by path, the attributes that were read, with the first value.
    """

    def __init__(self) -> None:
        self.values: dict[str, dict[str, Any]] = defaultdict(dict)

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record what this thread reads from the modules of a model.

        The context replaces ``nn.Module.__getattribute__`` for all threads, as torch.fx replaces ``nn.Module.__call__``
        and ``nn.Module.__getattr__``. The classes of the modules stay, since forward may compare them.
        """
        paths, thread = {id(module): path for path, module in model.named_modules()}, get_ident()
        internal, values = internal_names(), self.values
        inherited, get = vars(nn.Module).get("__getattribute__"), nn.Module.__getattribute__

        def read(module: nn.Module, name: str) -> Any:
            if name in internal or name.startswith("__") or get_ident() != thread or id(module) not in paths:
                return get(module, name)
            recorded = values[paths[id(module)]]
            recorded.setdefault(name, MISSING)
            value = get(module, name)
            if recorded[name] is MISSING:
                recorded[name] = value
            return value

        nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            if inherited is None:
                del nn.Module.__getattribute__
            else:
                nn.Module.__getattribute__ = inherited  # type: ignore[method-assign]


@cache
def internal_names() -> frozenset[str]:
    """Return the names of the attributes that every module has."""
    return frozenset(dir(nn.Module)) | frozenset(vars(nn.Module()))


def own_classes(module: nn.Module) -> list[type]:
    """Return the classes of a module that PyTorch does not define, the most special one first."""
    return [kind for kind in type(module).__mro__ if kind.__module__.partition(".")[0] not in ("torch", "builtins")]


def lost_members(model: nn.Module, network: nn.Module, read: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the methods and properties of a model's classes that users may need and that a graph does not have.

    These are the public members of the model's own class. Members that forward uses, or that ``__init__`` calls, also
    through others, count as helpers. For inner modules they are the methods of nn.Module that a class overrides, such
    as ``train``, because the graph would use those of nn.Module without notice.

    Args:
        model: the model.
        network: its graph module, which keeps modules that were not traced into.
        read: the attributes that forward has read, by the path of the module.
    """
    kept, lost = set(map(id, network.modules())), []
    for path, module in model.named_modules():
        if id(module) in kept:
            continue
        kinds = own_classes(module)
        helpers = _builders(kinds) | {*read.get(path, ())}
        members = {
            name: None for kind in kinds for name, value in vars(kind).items() if hasattr(type(value), "__get__")
        }
        for name in members:
            overrides = hasattr(nn.Module, name)
            is_needed = not path and not name.startswith("_") and name not in helpers
            if name not in _WITHOUT_EFFECT and not name.startswith("__") and (overrides or is_needed):
                lost.append(f"{path}.{name}".lstrip("."))
    return tuple(name for name in lost if not hasattr(network, name) or hasattr(nn.Module, name.rpartition(".")[2]))


def _builders(kinds: list[type]) -> set[str]:
    """Return the names that the code of ``__init__`` has, and that of the methods that it names, and so on."""
    names, waiting = set[str](), ["__init__"]
    while waiting:
        name = waiting.pop()
        codes = [getattr(vars(kind).get(name), "__code__", None) for kind in kinds]
        found = {each for code in codes if code is not None for each in code.co_names} - names
        names |= found
        waiting += found
    return names
