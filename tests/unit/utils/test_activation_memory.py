from __future__ import annotations

import torch
from torch import Tensor

from fxfact.utils import peak_bytes


def test_peak_bytes_counts_the_tensors_that_live_at_one_time() -> None:
    x = torch.randn(2, 100)  # 800 bytes, like every tensor here
    kept: list[Tensor] = []

    def chained() -> Tensor:
        return (x + 1).relu_().view(-1).neg().neg()

    assert peak_bytes(chained) == 1600
    assert peak_bytes(lambda: kept.extend([x + 1, x + 2, x + 3])) == 2400
    assert peak_bytes(lambda: x.view(-1).add_(1)) == 0  # in place
