"""Networks that are called on single samples without a batch axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.passes import run_passes
from fxfact.search.packed_convs import pack_chain
from tests.support import FakeTimer, apart

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class WithNorm(nn.Module):
    """A batch norm after a convolution, whose channels are as many as the map is long."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv1d(8, 32, 3, padding=1), nn.BatchNorm1d(32), nn.Conv1d(32, 32, 1)
        with torch.no_grad():
            for tensor in self.norm.state_dict().values():
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu())


def with_norm() -> nn.Module:
    torch.manual_seed(0)
    return WithNorm().eval()


def test_inference_passes_of_an_unbatched_network_are_the_same_without_inputs(tmp_path: Path) -> None:
    model, x = with_norm(), torch.randn(8, 32)
    small = fxfact.factorize(model, ["tucker", "svd"], rank=0.6, example_inputs=x)
    fast = fxfact.for_inference(small, x, timer=FakeTimer())
    assert "fold_batch_norms" not in fxfact.plan_of(fast).inference_passes
    assert apart(small(x), fast(x)) < 1e-5
    assert apart(fxfact.apply(fxfact.plan_of(fast), model)(x), fast(x)) < 1e-5
    fxfact.save(fast, tmp_path / "fast.pt")
    assert apart(fxfact.load(tmp_path / "fast.pt", with_norm())(x), fast(x)) < 1e-6


def test_inference_passes_of_a_batched_1d_network_fold_norms() -> None:
    model, x = with_norm(), torch.randn(2, 8, 32)
    fast = fxfact.for_inference(fxfact.factorize(model, "tucker", rank=0.6, example_inputs=x), x, timer=FakeTimer())
    assert "fold_batch_norms" in fxfact.plan_of(fast).inference_passes
    assert not any(isinstance(module, nn.BatchNorm1d) for module in fast.modules())
    assert apart(fxfact.apply(fxfact.plan_of(fast), model)(x), fast(x)) < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("capture", ["trace", "modules"])
def test_every_module_pass_computes_the_same_without_a_batch_axis(order: int, capture: Any) -> None:
    torch.manual_seed(0)
    kind = CONVS[order - 1]
    model = nn.Sequential(kind(8, 16, 3, padding=1), nn.ReLU(), kind(16, 16, 1)).eval()
    x = torch.randn(8, *(12, 10, 6)[:order])
    small = fxfact.factorize(model, ["tucker", "svd"], rank=0.7, example_inputs=x, capture=capture)
    assert len(fxfact.plan_of(small).rewrites) == 2
    for names in (("merge_pointwise",), ("channels_last",), ("channels_last", "pointwise_linear"), ("onednn",)):
        changed = run_passes(small, names)
        assert apart(small(x), changed(x)) < 1e-5
        assert apart(small(x[None]), changed(x[None])) < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_packed_chains_take_maps_without_a_batch_axis(order: int) -> None:
    torch.manual_seed(0)
    kind = CONVS[order - 1]
    chain = nn.Sequential(kind(8, 4, 1), kind(4, 4, 3, padding=1), kind(4, 8, 1)).eval()
    for name in ("channels_last", "pointwise_linear"):
        chain = run_passes(chain, (name,))  # type: ignore[assignment]
    x = torch.randn(8, *(12, 10, 6)[:order])
    for maps in (x, x[None]):
        assert apart(chain(maps), pack_chain(chain, maps)(maps)) < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_latency_budget_measures_maps_without_a_batch_axis(order: int) -> None:
    torch.manual_seed(0)
    kind = CONVS[order - 1]
    model = nn.Sequential(kind(16, 24, 3, padding=1), nn.ReLU(), kind(24, 16, 3, padding=1)).eval()
    x = torch.randn(16, *(48, 8, 4)[:order])
    result = fxfact.factorize(model, "tucker", budget=fxfact.Latency(0.7, timer=FakeTimer()), example_inputs=x)
    plan = fxfact.plan_of(result)
    assert plan.rewrites
    assert fxfact.verify(model, result, x).ok
    assert plan.after.macs <= 0.75 * plan.network.macs
