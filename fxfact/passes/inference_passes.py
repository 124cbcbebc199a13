"""Exact passes for networks that are only going to be run: the same outputs, in less time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import final

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxfact.conv import FORMS, to_channels_last, to_linear, to_onednn
from fxfact.errors import PlanError
from fxfact.graph import check_invariants, fold_batch_norms, merge_pointwise, refresh_shapes
from fxfact.passes.history import pass_history, set_history
from fxfact.utils import copy_with_shared


class _Exact(PassBase):
    """Works on a copy, which shares what it does not change, and leaves the graph module given as it is."""

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise GraphError unless the graph is one that a pass can work on."""
        check_invariants(graph_module, f"before {type(self).__name__}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """The result; ``modified`` is False, and the result the module given, where there was nothing to do."""
        result = copy_with_shared(graph_module, set(map(id, graph_module.parameters())))
        assert isinstance(result, fx.GraphModule)
        if not self._change(result):
            return PassResult(graph_module, False)
        result.recompile()
        refresh_shapes(result)
        set_history(result, pass_history(graph_module))
        check_invariants(result, f"behind {type(self).__name__}")
        return PassResult(result, True)

    @abstractmethod
    def _change(self, graph_module: fx.GraphModule) -> int:
        """How many places were changed."""


@final
class FoldBatchNorms(_Exact):
    """Batch norms in evaluation mode become part of the convolutions before them. Not for training."""

    def _change(self, graph_module: fx.GraphModule) -> int:
        return fold_batch_norms(graph_module)


@final
class MergePointwise(_Exact):
    """Of two 1×1 convolutions with nothing between one, where that has no more parameters. Not for training."""

    def _change(self, graph_module: fx.GraphModule) -> int:
        return merge_pointwise(graph_module)


@final
class ChannelsLast(_Exact):
    """The weights of convolutions in channels_last, in which PyTorch then computes them, whatever format comes in."""

    def _change(self, graph_module: fx.GraphModule) -> int:
        return to_channels_last(graph_module)


@final
class PointwiseLinear(_Exact):
    """1×1 convolutions computed as matrix products, which takes less time where maps are channels_last."""

    def _change(self, graph_module: fx.GraphModule) -> int:
        return to_linear(graph_module)


@final
class OneDNN(_Exact):
    """3-D convolutions computed by oneDNN on processors, also where PyTorch takes a slower kernel of its own."""

    def _change(self, graph_module: fx.GraphModule) -> int:
        return to_onednn(graph_module)


_PASSES: dict[str, type[_Exact]] = {
    "fold_batch_norms": FoldBatchNorms,
    "merge_pointwise": MergePointwise,
    "channels_last": ChannelsLast,
    "pointwise_linear": PointwiseLinear,
    "onednn": OneDNN,
}


def run_passes(network: nn.Module, form: Sequence[str]) -> nn.Module:
    """A copy of the network with these passes applied, of which one without a graph takes those that change
    modules alone. Raises PlanError for another name.
    """
    for name in form:
        if name not in _PASSES:
            raise PlanError(f"{name!r} is no form for inference. There are: {', '.join(_PASSES)}.")
        if isinstance(network, fx.GraphModule):
            result = _PASSES[name]()(network)
            assert result is not None
            network = result.graph_module
        elif name in FORMS:
            network = copy_with_shared(network, set(map(id, network.parameters())))
            FORMS[name](network)
    return network
