from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfact

pytestmark = pytest.mark.integration


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.middle = nn.Conv2d(12, 16, 3, padding="same", groups=2)
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.middle(self.features(x)))
        return self.head(F.relu(self.up(x)).mean((2, 3)))


@torch.no_grad()
def test_backend_hands_the_graph_to_inductor() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 10, 10)
    compiled = torch.compile(model, backend=fxfact.backend("tucker", rank=0.5, inner="inductor"))
    small = fxfact.factorize(model, "tucker", rank=0.5, example_inputs=x)
    torch.testing.assert_close(compiled(x), small(x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
