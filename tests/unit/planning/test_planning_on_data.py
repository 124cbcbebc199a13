"""Plans and chains that are fitted to data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.conv import ConvSpec, Skip
from fxfact.factorizations import Factorization
from fxfact.factorizations.linalg import truncated_svd
from fxfact.factorizations.stages import pointwise
from tests.support import ALL, Classifier, by_name


@pytest.fixture
def model(classifier: Classifier) -> nn.Module:
    return classifier


@pytest.fixture
def x(color_images: Tensor) -> Tensor:
    return color_images


def test_decomposition_on_data_is_closer_at_the_output(model: nn.Module, x: Tensor) -> None:
    x = x * torch.logspace(0, -3, 3)[:, None, None]  # one channel of the input hardly matters
    plain, aware = (
        fxfact.factorize(model, "channel_svd", rank=0.4, calibration=calibration, example_inputs=x[:1])
        for calibration in (None, x.split(8))
    )
    expected = model(x)
    assert (aware(x) - expected).norm() < (plain(x) - expected).norm()


@pytest.mark.parametrize("factorization", ALL, ids=by_name)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_stages_fitted_to_data_have_the_strides_of_new_tensors(factorization: Any, order: int) -> None:
    """PyTorch chooses the memory format by the strides of the weight, also for 1×1 kernels."""
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[order - 1]
    model = nn.Sequential(kind(6, 8, 3), kind(8, 12, 3), nn.Flatten(), nn.Linear(12 * 2**order, 3)).eval()
    x = torch.randn(8, 6, *[6] * order, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"include": "1", "allow_growth": True}
    refused = isinstance(factorization.rejects(ConvSpec.parse(8, 12, (3,) * order)), Skip)
    small = fxfact.factorize(model, factorization, rank=0.6, calibration=[x], **options)
    assert bool(fxfact.plan_of(small).rewrites) != refused
    assert all(p.stride() == torch.empty(p.shape).stride() for p in small.parameters())


@dataclass(frozen=True, kw_only=True)
class DepthwiseFirst(Factorization):
    """Depthwise k×k, R maps of every channel → 1×1: an SVD of every input channel's kernels."""

    name = "depthwise_first"

    def _rejects(self, block: ConvSpec) -> str | None:
        return "transposed" if block.transposed else None

    def _max_rank(self, block: ConvSpec) -> tuple[int, ...]:
        return (min(math.prod(block.kernel_size), block.out_channels),)

    def _stages(self, block: ConvSpec, rank: tuple[int, ...]) -> tuple[ConvSpec, ...]:
        maps = block.in_channels * rank[0]
        return (replace(block, out_channels=maps, groups=block.in_channels), pointwise(block, maps, block.out_channels))

    def _weights(self, block: ConvSpec, weight: Tensor, rank: tuple[int, ...], random: Any) -> tuple[Tensor, ...]:
        parts = [truncated_svd(part.flatten(1), *rank) for part in weight.unbind(1)]
        return torch.cat([right for _, right in parts]), torch.cat([left for left, _ in parts], 1)


def test_factorization_with_grouped_first_stage_is_planned_on_data(model: nn.Module, x: Tensor) -> None:
    asked: dict[str, Any] = {"calibration": x.split(8), "example_inputs": x[:1], "verify": True}
    given = fxfact.factorize(model, DepthwiseFirst(), rank=2, **asked)
    within = fxfact.factorize(model, DepthwiseFirst(), budget=fxfact.Macs(0.7), **asked)
    assert [d.path for d in fxfact.plan_of(given).rewrites] == ["first", "grouped"]
    assert fxfact.plan_of(within).rewrites
