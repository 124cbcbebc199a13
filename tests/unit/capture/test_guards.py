"""Guards: a forward that writes to its parameters is refused before it writes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.errors import CaptureError
from tests.support import Small, copied_state, has_state


class Writing(Small):
    """Changes its own parameters in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        weight = self.second.weight
        if self.way == "data":
            weight.data.mul_(0.5)
        elif self.way == "no_grad":
            with torch.no_grad():
                weight.mul_(0.5)
        elif self.way == "new data":
            weight.data = weight.data * 0.5
        elif self.way == "new parameter":
            self.second.weight = nn.Parameter(weight * 0.5)
        elif self.way == "all":
            for parameter in self.parameters():
                parameter.data.mul_(0.5)
        elif self.way == "foreach":
            torch._foreach_mul_([p.data for p in self.parameters()], 0.5)
        elif self.way == "view":
            weight.detach()[0].zero_()
        return super().forward(x)


@pytest.mark.parametrize("way", ["data", "no_grad", "new data", "new parameter", "all", "foreach", "view"])
def test_forward_that_writes_to_its_parameters_is_refused(image: Tensor, way: str) -> None:
    model = Writing(way)
    before, identities = copied_state(model), [id(p) for p in model.parameters()]
    with pytest.raises(CaptureError, match=r"(first|second)\.\w+: forward changes this parameter"):
        fxfact.factorize(model, example_inputs=image)
    with pytest.raises(CaptureError, match=r"(forward (changes this|turns gradients off|sets the attr)|cannot assign)"):
        fxfact.factorize(model)
    assert has_state(model, before)
    assert [id(p) for p in model.parameters()] == identities
