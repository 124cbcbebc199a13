"""The sites of a network: convolutions that can be rewritten (ConvSite), and what is left as it is (Skip)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from fxfact.conv.chain import ConvLayer
from fxfact.conv.convolve import from_torch
from fxfact.conv.spec import ConvSpec, Sizes


@dataclass(frozen=True)
class Skip:
    """The reason why something is left as it is.

    Attributes:
        reason: The reason.
        subject: The path of the convolution or the name of the node.
    """

    reason: str
    subject: str = ""


Site = TypeVar("Site", bound="ConvSite")


@dataclass(frozen=True, eq=False, kw_only=True)
class ConvSite:
    """A convolution of a network that can be rewritten.

    Attributes:
        path: The path of the module, or of the weight's owner.
        spec: The shapes and settings of the convolution.
        weight: The weight that the network holds, in PyTorch's layout.
        bias: The bias that the network holds, or None.
        input_shapes: The shape of the input at every call, or None if the shapes are not known.
        tied_to: The path of the first site with the same weight, or None if this is the first.
    """

    path: str
    spec: ConvSpec
    weight: Tensor
    bias: Tensor | None
    input_shapes: tuple[Sizes, ...] | None = None
    tied_to: str | None = None

    @property
    def layer(self) -> ConvLayer:
        """The convolution with detached tensors."""
        weight = from_torch(self.spec, self.weight.detach())
        return ConvLayer(self.spec, weight, None if self.bias is None else self.bias.detach())

    def input_sizes(self, samples: int = 1) -> tuple[Sizes, ...] | None:
        """Return the spatial size at every call, once per sample, or None if the shapes are not known.

        The size of a linear layer is the number of its positions for one sample. ``samples`` is the number of samples
        in the example inputs from which ``input_shapes`` was recorded.
        """
        if self.input_shapes is None:
            return None
        order, sizes = self.spec.order, list[Sizes]()
        for shape in self.input_shapes:
            if not order:
                positions = math.prod(shape[:-1])
                sizes.append((max(1, positions // samples) if positions else 0,))
                continue
            batch = shape[0] if len(shape) == order + 2 else 1
            sizes += [shape[-order:]] * max(1, batch // samples)
        return tuple(sizes)


def path_of(found: ConvSite | Skip) -> str:
    """Return the path of a convolution, whether it can be rewritten or not."""
    return found.path if isinstance(found, ConvSite) else found.subject


def mark_tied(sites: Sequence[Site]) -> list[Site]:
    """Return the sites with ``tied_to`` set on each one whose weight an earlier site has."""
    first: dict[int, str] = {}
    leaders = [first.setdefault(id(site.weight), site.path) for site in sites]
    return [
        site if leader == site.path else replace(site, tied_to=leader)
        for site, leader in zip(sites, leaders, strict=True)
    ]
