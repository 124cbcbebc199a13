from __future__ import annotations

import pytest
from torch import Tensor, nn

import fxfact
from tests.support import Small, apart, params_of


def test_inspect_lists_every_convolution(small: Small, image: Tensor) -> None:
    result = fxfact.factorize(small, "channel_svd", exclude="first")
    inspection = fxfact.inspect(result, example_inputs=image)
    first, second, head = inspection.rows
    assert [str(stage) for stage in head.stages] == ["Linear(12→5)"]
    assert (first.path, first.factorization, first.relative_error) == ("first", "-", None)
    assert (second.path, second.factorization, second.origin) == (
        "second",
        "channel_svd",
        "Conv2d(8→12, 3×3, stride 2, padding 1)",
    )
    assert [stage.kernel_size for stage in second.stages] == [(3, 3), (1, 1)]
    assert second.cost == fxfact.plan(small, "channel_svd", example_inputs=image)["second"].after
    assert second.cost.params == params_of([result.second])
    kernel = fxfact.compose(
        fxfact.ConvChain(
            tuple(
                fxfact.ConvLayer(spec, m.weight, m.bias) for spec, m in zip(second.stages, result.second, strict=True)
            )
        )
    )
    assert second.relative_error == pytest.approx(apart(small.second.weight, kernel), rel=1e-4)
    text = str(inspection)
    assert "channel_svd" in text
    assert f"{second.relative_error:.3g}" in text


def test_inspect_gives_a_verdict_for_every_node(small: Small) -> None:
    shown = dict(fxfact.inspect(small, nodes=True).nodes)
    assert shown["first"].startswith("first: Conv2d")
    assert shown["norm"] == "BatchNorm2d is not a convolution"
    assert "relu" in shown["relu"]
    assert len(shown) == 9
    assert fxfact.inspect(small).nodes == ()


def test_inspect_says_why_a_convolution_cannot_be_rewritten() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(2, 2, 3))
            self.unused = nn.Conv2d(2, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x)

    remarks = {row.path: row.remark for row in fxfact.inspect(Two()).rows}
    assert "computed" in remarks["up"]
    assert "does not call" in remarks["unused"]


def test_inspect_counts_the_macs_of_one_sample(small: Small, image: Tensor) -> None:
    result = fxfact.factorize(small, example_inputs=image)
    counted = [row.cost.macs for row in fxfact.inspect(result).rows]
    assert counted == [decision.after.macs for decision in fxfact.plan_of(result)]


def test_inspect_knows_no_error_of_a_stage_factorized_again(small: Small) -> None:
    twice = fxfact.factorize(fxfact.factorize(small), "spatial_svd", include="second.1")
    assert [row.relative_error is None for row in fxfact.inspect(twice).rows] == [False, True, True]


def test_inspect_knows_no_error_of_empty_weights(small: Small) -> None:
    empty = fxfact.apply(fxfact.plan(small), small, weights="empty")
    assert [row.relative_error for row in fxfact.inspect(empty).rows] == [None, None, None]
