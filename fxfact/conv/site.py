"""The ordinary value that says why something is left as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from fxfact.conv.chain import ConvLayer, from_torch
from fxfact.conv.spec import ConvSpec, Sizes


@dataclass(frozen=True)
class Skip:
    """Why ``subject`` (the path of a convolution, or the name of a node) is left alone."""

    reason: str
    subject: str = ""


Site = TypeVar("Site", bound="ConvSite")


@dataclass(frozen=True, eq=False, kw_only=True)
class ConvSite:
    """A convolution that can be rewritten.

    ``weight`` (in PyTorch's layout) and ``bias`` are the tensors that the network holds. ``input_shapes`` has the shape
    at every call, None where unknown. ``tied_to`` is the path of the first site that has the same weight, where that is
    another one.
    """

    path: str
    spec: ConvSpec
    weight: Tensor
    bias: Tensor | None
    input_shapes: tuple[Sizes, ...] | None = None
    tied_to: str | None = None

    @property
    def layer(self) -> ConvLayer:
        """What it computes, on detached tensors."""
        weight = from_torch(self.spec, self.weight.detach())
        return ConvLayer(self.spec, weight, None if self.bias is None else self.bias.detach())

    def input_sizes(self, samples: int = 1) -> tuple[Sizes, ...] | None:
        """The spatial size at every call, once per sample; None where unknown."""
        if self.input_shapes is None:
            return None
        order, sizes = self.spec.order, []
        for shape in self.input_shapes:
            batch = shape[0] if len(shape) == order + 2 else 1
            sizes += [shape[-order:]] * max(1, batch // samples)
        return tuple(sizes)


def path_of(found: ConvSite | Skip) -> str:
    """Where a convolution is, whether it can be rewritten or not."""
    return found.path if isinstance(found, ConvSite) else found.subject


def mark_tied(sites: Sequence[Site]) -> list[Site]:
    """The sites, those marked whose weight another one before them has."""
    first: dict[int, str] = {}
    leaders = [first.setdefault(id(site.weight), site.path) for site in sites]
    return [
        site if leader == site.path else replace(site, tied_to=leader)
        for site, leader in zip(sites, leaders, strict=True)
    ]
