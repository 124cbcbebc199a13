"""What the graph code hands around."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from fxfact.conv import ConvLayer, Sizes
from fxfact.skip import Skip


@dataclass(frozen=True, eq=False)
class Captured:
    """A model's graph, private to us: its structure is a copy, its tensors are still the model's own.

    ``macs`` is the whole network's for one sample, None without example inputs. ``unreached`` are the model's
    convolutions that the graph does not call.
    """

    graph_module: fx.GraphModule
    macs: int | None
    samples: int
    unreached: tuple[Skip, ...]


@dataclass(frozen=True, eq=False)
class ConvSite:
    """Where a convolution lives in a graph: every node that calls it, and what it computes.

    ``attributes`` names the tensors that a functional call reads from the module tree; empty for a module call.
    ``tied_to`` is the path of the first site that has the same weight, where that is another one.
    """

    path: str
    nodes: tuple[fx.Node, ...]
    layer: ConvLayer
    attributes: tuple[str, ...] = ()
    tied_to: str | None = None

    @property
    def weight_name(self) -> str:
        """The dotted name of the weight in the module tree."""
        return self.attributes[0] if self.attributes else f"{self.path}.weight"

    def input_sizes(self, samples: int = 1) -> tuple[Sizes, ...] | None:
        """The spatial size at every call, once per sample; None where the graph carries no shapes."""
        order, sizes = self.layer.spec.order, []
        for node in self.nodes:
            shape = shape_of(input_of(node))
            if shape is None:
                return None
            batch = shape[0] if len(shape) == order + 2 else 1
            sizes += [shape[-order:]] * max(1, batch // samples)
        return tuple(sizes)


def path_of(found: ConvSite | Skip) -> str:
    """Where a convolution is, whether it can be rewritten or not."""
    return found.path if isinstance(found, ConvSite) else found.subject


def input_of(call: fx.Node) -> fx.Node:
    """What a convolution is called on: its first argument, which may be given as ``input=``."""
    source = call.args[0] if call.args else call.kwargs["input"]
    assert isinstance(source, fx.Node)
    return source


def shape_of(node: fx.Node) -> Sizes | None:
    """The shape that the node's ``meta`` records (``val`` or ``tensor_meta``), if it does."""
    recorded = node.meta.get("val", node.meta.get("tensor_meta"))
    shape = getattr(recorded, "shape", None)
    return None if shape is None else tuple(shape)


def get_tensor(root: nn.Module, target: str) -> Tensor | None:
    """The parameter or buffer at a dotted path, or None where there is none."""
    owner, _, name = target.rpartition(".")
    found = getattr(root.get_submodule(owner), name, None)
    return found if isinstance(found, Tensor) else None
