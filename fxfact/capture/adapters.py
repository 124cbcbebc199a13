"""Finds the adapters of a network, such as LoRA: layers beside a base layer, to be merged into it or removed later.

A module with an adapter has its original layer as the child ``base_layer``, and names its own parts in
``adapter_layer_names``, as peft's layers do. Each part holds one layer for each adapter, by the adapter's name.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def find_adapters(network: nn.Module) -> dict[str, str]:
    """Return the paths of all modules that belong to an adapter, and the names of the adapter and of its owner.

    Graphs have lost the classes of their modules. There an owner is recognised by its children: a ``base_layer`` that
    has a weight, and two or more parts with children of the same names.
    """
    found: dict[str, str] = {}
    for path, owner in network.named_modules():
        for part in _parts(owner):
            for name, _ in part[1].named_modules():
                if name:
                    adapter = name.partition(".")[0]
                    member = ".".join(filter(None, (path, part[0], name)))
                    found[member] = f"the adapter {adapter!r} of {path or 'the model'}"
    return found


def _parts(owner: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the parts of a module that hold its adapters, with their names."""
    children = dict(owner.named_children())
    base = children.pop("base_layer", None)
    names = getattr(type(owner), "adapter_layer_names", None)
    if base is None:
        return []
    if isinstance(names, tuple | list):
        return [(name, part) for name, part in children.items() if name in names]
    if type(owner) is not nn.Module or not isinstance(getattr(base, "weight", None), Tensor):
        return []
    same = [part for part in children.items() if _names(part[1]) and _names(part[1]) == _first(children)]
    return same if len(same) > 1 else []


def _names(part: nn.Module) -> set[str]:
    return {name for name, _ in part.named_children()}


def _first(children: Mapping[str, nn.Module]) -> set[str]:
    return next((_names(part) for part in children.values() if _names(part)), set())
