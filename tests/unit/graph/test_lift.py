"""Parameters that are inputs of a graph become attributes for a rewrite, and inputs again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfact.graph import lift, lower, match, splice
from tests.support import apart


def graph_with_inputs() -> fx.GraphModule:
    """A graph whose inputs are the weight and the bias of a convolution, and the image."""

    def forward(weight: Tensor, bias: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        return F.conv2d(x * scale, weight, bias, padding=1)

    return fx.symbolic_trace(forward)


def values(image: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = torch.randn(6, 4, 3, 3), torch.randn(6), torch.randn(())
    return [*(nn.Parameter(tensor) for tensor in tensors), image]


def test_lift_makes_weights_and_biases_attributes(image: Tensor) -> None:
    original, given = graph_with_inputs(), values(image)
    code = original.code
    lifted = lift(original, given)
    assert dict(lifted.input_index) == {"weight": 0, "bias": 1}
    (site,) = match(lifted.graph_module).sites
    assert site.weight is given[0]
    assert site.bias is given[1]
    assert original.code == code
    assert [node.op for node in original.graph.nodes][:4] == ["placeholder"] * 4
    assert apart(original(*given), lifted.graph_module(*given)) == 0


def test_lower_makes_attributes_and_stages_inputs_again(image: Tensor) -> None:
    original, given = graph_with_inputs(), values(image)
    lifted = lift(original, given)
    graph_module = lifted.graph_module
    sites = match(graph_module).sites
    first, second = nn.Conv2d(4, 3, 1, bias=False), nn.Conv2d(3, 6, 3, padding=1)
    splice(graph_module, sites[0], [first, second], pass_name="test")
    graph_module.recompile()
    lowered, factors = lower(lifted, graph_module, sites)
    assert [(factor.path, factor.stage) for factor in factors] == [("weight", 0), ("weight", 1)]
    assert list(lowered.parameters()) == []
    found = lowered(*given, first.weight, second.weight)
    expected = F.conv2d(F.conv2d(image * given[2], first.weight), second.weight, given[1], padding=1)
    assert apart(expected, found) < 1e-6
