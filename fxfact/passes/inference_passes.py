"""Exact passes for networks that will only be run: the same outputs in less time. One registry holds all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, final

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxfact.conv import CHANNELS_LAST, ONEDNN_TYPES, POINTWISE_TYPES, ConvSpec, is_conv, spec_of, why_unsupported
from fxfact.errors import PlanError
from fxfact.graph import check_invariants, fold_batch_norms, merge_pointwise, refresh_shapes
from fxfact.passes.history import pass_history, set_history
from fxfact.utils import copy_structure


class InferencePass(PassBase):
    """A pass that changes how a network computes its outputs, but not the outputs.

    Called on a graph module it works on a copy, which shares what it does not change.
    """

    name: ClassVar[str]
    needs_graph: ClassVar[bool] = False  # otherwise the pass changes single modules of any network

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Check the graph before the pass.

        Args:
            graph_module: the graph module.

        Raises:
            ArgumentTypeError: if it is no graph module.
            GraphError: if a pass cannot work on the graph.
        """
        check_invariants(graph_module, f"before {type(self).__name__}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass on a copy.

        Args:
            graph_module: the graph module, which is not changed.

        Returns:
            The result. If there was nothing to do, ``modified`` is False and the result is the module itself.

        Raises:
            GraphError: if the result is not a graph that a pass can work on.
        """
        result = copy_structure(graph_module)
        assert isinstance(result, fx.GraphModule)
        if not self.change(result):
            return PassResult(graph_module, False)
        result.recompile()
        refresh_shapes(result)
        set_history(result, pass_history(graph_module))
        check_invariants(result, f"after {type(self).__name__}")
        return PassResult(result, True)

    @abstractmethod
    def change(self, network: nn.Module) -> int:
        """Change a private copy in place.

        Args:
            network: the copy. It is a graph module if ``needs_graph`` is set.

        Returns:
            The number of places that were changed.
        """


@final
class FoldBatchNorms(InferencePass):
    """Fold batch norms in evaluation mode into the convolutions before them. Not for training."""

    name = "fold_batch_norms"
    needs_graph = True

    def change(self, network: nn.Module) -> int:
        """Fold all batch norms that can be folded."""
        assert isinstance(network, fx.GraphModule)
        return fold_batch_norms(network)


@final
class MergePointwise(InferencePass):
    """Merge two consecutive 1×1 convolutions into one if that has no more parameters. Not for training."""

    name = "merge_pointwise"
    needs_graph = True

    def change(self, network: nn.Module) -> int:
        """Merge all pairs that can be merged."""
        assert isinstance(network, fx.GraphModule)
        return merge_pointwise(network)


@final
class ChannelsLast(InferencePass):
    """Store the weights of convolutions in channels_last; PyTorch then computes them in that memory format."""

    name = "channels_last"

    def change(self, network: nn.Module) -> int:
        """Convert all weights of 2-D and 3-D convolutions. Shared weights stay shared."""
        converted: dict[int, nn.Parameter] = {}
        for module in network.modules():
            weight = module._parameters.get("weight") if is_conv(module) else None
            wanted = None if weight is None else CHANNELS_LAST.get(weight.ndim)
            if weight is None or wanted is None or weight.is_contiguous(memory_format=wanted):
                continue
            values = weight.detach().contiguous(memory_format=wanted)
            parameter = nn.Parameter(values, requires_grad=weight.requires_grad)
            module.weight = converted.setdefault(id(weight), parameter)
        return len(converted)


@final
class PointwiseLinear(InferencePass):
    """Compute 1×1 convolutions as matrix products, which is faster if feature maps are channels_last."""

    name = "pointwise_linear"

    def change(self, network: nn.Module) -> int:
        """Convert all convolutions that ``can_be_linear``."""
        return _change_types(network, POINTWISE_TYPES, can_be_linear)


@final
class OneDNN(InferencePass):
    """Compute 3-D convolutions with oneDNN on CPUs, also where PyTorch would choose a slower kernel of its own."""

    name = "onednn"

    def change(self, network: nn.Module) -> int:
        """Convert all convolutions that ``can_be_onednn``."""
        return _change_types(network, ONEDNN_TYPES, can_be_onednn)


# Later passes rely on earlier ones: matrix products want channels_last.
INFERENCE_PASSES: dict[str, type[InferencePass]] = {
    kind.name: kind for kind in (FoldBatchNorms, MergePointwise, ChannelsLast, PointwiseLinear, OneDNN)
}
MODULE_PASSES = tuple(name for name, kind in INFERENCE_PASSES.items() if not kind.needs_graph)


def run_passes(network: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return a copy of the network after these passes. Passes that need a graph are left out if it has none.

    Raises:
        PlanError: for a name that is not in ``INFERENCE_PASSES``.
    """
    for name in names:
        if name not in INFERENCE_PASSES:
            raise PlanError(f"{name!r} is not an inference pass. There are: {', '.join(INFERENCE_PASSES)}.")
        inference_pass = INFERENCE_PASSES[name]()
        if isinstance(network, fx.GraphModule):
            result = inference_pass(network)
            assert result is not None
            network = result.graph_module
        elif not inference_pass.needs_graph:
            network = copy_structure(network)
            inference_pass.change(network)
    return network


def can_be_linear(spec: ConvSpec) -> bool:
    """Return whether a convolution only multiplies the channels at every position by its weight.

    A linear layer is a matrix product already.
    """
    return spec.order > 0 and spec.is_pointwise and spec.groups == 1


def can_be_onednn(spec: ConvSpec) -> bool:
    """Return whether a convolution is 3-D, not transposed, and has symmetric zero padding."""
    symmetric = all(before == after for before, after in spec.padding)
    return spec.order == 3 and not spec.transposed and spec.padding_mode == "zeros" and symmetric


def linear_passes(specs: Iterable[ConvSpec]) -> tuple[str, ...]:
    """Return the passes for matrix products in a network of these convolutions. 1-D ones need no channels_last."""
    return (*((ChannelsLast.name,) if any(spec.order > 1 for spec in specs) else ()), PointwiseLinear.name)


def _change_types(
    network: nn.Module, types: Mapping[type[nn.Module], type[nn.Module]], applies: Callable[[ConvSpec], bool]
) -> int:
    changed = 0
    for module in network.modules():
        if type(module) in types and not why_unsupported(module) and applies(spec_of(module)):
            module.__class__ = types[type(module)]
            changed += 1
    return changed
