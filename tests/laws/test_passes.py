"""Every pass satisfies the laws. A new one gets a class here that says how it is made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase

import fxfact
from fxfact.conv import is_conv
from fxfact.errors import GraphError
from fxfact.passes import (
    INFERENCE_PASSES,
    ChannelsLast,
    FactorizeConvs,
    FoldBatchNorms,
    InferencePass,
    MergePointwise,
    OneDNN,
    PointwiseLinear,
)
from tests.laws.pass_laws import Foldable, PassLaws


def test_every_inference_pass_has_a_class_here() -> None:
    tested = {kind.__name__.removeprefix("Test") for kind in PassLaws.__subclasses__()}
    assert {kind.__name__ for kind in INFERENCE_PASSES.values()} <= tested


class TestFactorizeConvs(PassLaws):
    """Of kernels that have the rank, so that the chains are exact."""

    def make(self, model: nn.Module, inputs: Tensor) -> PassBase:
        return FactorizeConvs(
            fxfact.plan(model, ["channel_svd", "svd"], rank=2, example_inputs=inputs, allow_growth=True)
        )

    def make_model(self) -> nn.Module:
        model = Foldable().double().eval()
        for module in model.modules():
            if is_conv(module):
                matrix = module.weight.detach().flatten(1)
                rows = torch.randn(len(matrix), 2, dtype=torch.float64)
                module.weight.data = (rows @ matrix[:2]).reshape(module.weight.shape)
        return model


class TestFoldBatchNorms(PassLaws):
    def make(self, model: nn.Module, inputs: Tensor) -> PassBase:
        return FoldBatchNorms()


class TestMergePointwise(PassLaws):
    def make(self, model: nn.Module, inputs: Tensor) -> PassBase:
        return MergePointwise()


class TestChannelsLast(PassLaws):
    def make(self, model: nn.Module, inputs: Tensor) -> PassBase:
        return ChannelsLast()


class TestPointwiseLinear(PassLaws):
    def make(self, model: nn.Module, inputs: Tensor) -> PassBase:
        return PointwiseLinear()


class Convs3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.last, self.head = nn.Conv3d(8, 6, 3, stride=2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.last(x)).mean((2, 3, 4)))


class TestOneDNN(PassLaws):
    def make(self, model: nn.Module, inputs: Tensor) -> PassBase:
        return OneDNN()

    def make_model(self) -> nn.Module:
        return Convs3d().double().eval()

    def make_inputs(self) -> Tensor:
        return torch.randn(1, 3, 6, 7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# A pass of one's own


class RemoveDropouts(InferencePass):
    """Removes dropouts in evaluation mode."""

    name = "remove_dropouts"
    needs_graph = True

    def change(self, network: nn.Module) -> int:
        assert isinstance(network, fx.GraphModule)
        dropouts = [
            node
            for node in network.graph.nodes
            if node.op == "call_module" and isinstance(network.get_submodule(node.target), nn.Dropout)
        ]
        for node in dropouts:
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
        return len(dropouts)


class TestPassOfOnesOwn(PassLaws):
    def make(self, model: nn.Module, inputs: Tensor) -> PassBase:
        return RemoveDropouts()

    def make_model(self) -> nn.Module:
        layers = [nn.Conv2d(3, 4, 3), nn.Dropout(), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 4, 3)]
        return nn.Sequential(*layers).double().eval()


class BreakTheGraph(InferencePass):
    name = "break_the_graph"
    needs_graph = True

    def change(self, network: nn.Module) -> int:
        assert isinstance(network, fx.GraphModule)
        network.delete_submodule("0")
        return 1


def test_pass_that_breaks_the_graph_is_found_out() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
    with pytest.raises(GraphError, match=r"^after BreakTheGraph: the graph is not well formed"):
        BreakTheGraph()(model)
    assert isinstance(model.get_submodule("0"), nn.Conv2d)
