"""Weights that forward() reads itself."""

from __future__ import annotations

from torch import Tensor, nn

import fxfact


def test_part_of_a_weight_that_forward_reads_is_noticed(color_images: Tensor) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x)) * self.two.weight[3:5].sum()

    model = Reading().eval()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    plan = fxfact.plan(model, "tucker", rank=0.5, example_inputs=color_images[:2], capture="modules")
    assert [decision.path for decision in plan.rewrites] == ["one"]
    assert "its weight is also read by" in plan["two"].reason
