"""Error curves: computed at a few ranks, interpolated in between, and found again in a cache."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.capture import capture
from fxfact.conv import ConvSpec, compose
from fxfact.errors import PlanError
from fxfact.factorizations import Factorization, Tucker
from fxfact.factorizations.cp import CPMobilenet
from fxfact.factorizations.matrix_svd import ChannelSVD
from fxfact.planning import ErrorCurveCache, SearchScope, draft_plan
from fxfact.planning.error_curves import cache_key, error_curves, interpolate, relative_square_error
from tests.support import SPECS, random_layer

LAYER = random_layer(SPECS["dilated"], torch.float32)  # without a bias


def ranks_of(factorization: Factorization) -> list[tuple[int, ...]]:
    return list(factorization.ranks(LAYER.spec))


# Curves


def test_error_curve_of_an_svd_is_exact_at_every_rank() -> None:
    method, weight = ChannelSVD(), LAYER.weight
    (curve,) = error_curves(LAYER, [(method, ranks_of(method))], None)
    assert [rank for rank, _ in curve] == ranks_of(method)
    for rank, error in curve:
        chain = method.decompose(LAYER, rank)
        expected = float((compose(chain) - weight).square().sum() / weight.square().sum())
        assert error == pytest.approx(expected, abs=1e-6)


class WithoutBounds(ChannelSVD):
    def _spectra(self, block: ConvSpec, weight: Tensor) -> list[Tensor]:
        return []


def test_error_curve_without_a_closed_form_is_computed_at_six_ranks_that_are_closer_if_small() -> None:
    method = WithoutBounds()
    layer = random_layer(ConvSpec.parse(40, 40, (3, 3)), torch.float32)
    ranks = list(method.ranks(layer.spec))
    (curve,) = error_curves(layer, [(method, ranks)], None)
    computed = [rank for (rank,), _ in curve]
    assert len(computed) == 6
    assert computed[0] == 1
    assert 0.8 * len(ranks) < computed[-1] <= 0.9 * len(ranks)
    steps = [after - before for before, after in pairwise(computed)]
    assert steps == sorted(steps)
    assert all(error == relative_square_error(layer, method, rank) for rank, error in curve)


def test_error_curve_of_fisher_information_is_the_predicted_loss_increase(model: nn.Module, x: Tensor) -> None:
    statistics = fxfact.calibrate(model, x.split(8))
    (candidate, *_) = draft_plan(capture(model, x[:1]), SearchScope()).candidates
    method, fisher = ChannelSVD(), statistics.fisher(candidate.path, candidate.spec)
    assert fisher is not None
    (curve,) = error_curves(candidate.layer, [(method, [(2,), (5,)])], fisher)
    for rank, increase in curve:
        chain = method.decompose(candidate.layer, rank, metric=fisher)
        error = compose(chain) - candidate.layer.weight
        assert increase == pytest.approx(fisher.loss_increase(candidate.spec, error), rel=1e-3)


def test_relative_square_error_does_not_depend_on_chance_or_scale() -> None:
    method = CPMobilenet(init="random", sweeps=3)
    found = relative_square_error(LAYER, method, (4,))
    torch.manual_seed(1)
    assert relative_square_error(LAYER, method, (4,)) == found
    large = replace(LAYER, weight=LAYER.weight * 2.0**60)
    assert relative_square_error(large, method, (4,)) == pytest.approx(found)


def test_interpolation_is_linear_in_the_logarithm_over_the_sum_of_the_rank() -> None:
    curve = [((1, 1), 1.0), ((3, 3), 0.01)]
    assert interpolate(curve, [(1, 1), (2, 2), (1, 4), (3, 3)]) == pytest.approx([1.0, 0.1, 10**-1.5, 0.01])
    assert interpolate(curve, [(1, 0), (9, 9)]) == pytest.approx([1.0, 0.01])  # outside, the value at the end


def test_interpolation_never_increases_and_accepts_zeros() -> None:
    found = interpolate([((1,), 1.0), ((2,), 0.1), ((3,), 0.2), ((4,), 0.0)], [(1,), (2,), (3,), (4,)])
    assert found == sorted(found, reverse=True)
    assert found[1] == found[2] == pytest.approx(0.1)
    assert 0 < found[3] < 1e-11
    assert interpolate([((1,), 0.0), ((2,), 0.0)], [(1,)]) == pytest.approx([0.0], abs=1e-200)


# The cache


class Computed:
    """A progress bar that counts the curves that are computed."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, iterable: Iterable[Any], *, total: int, desc: str) -> Iterable[Any]:
        self.count += total if desc == "planning" else 0
        return iterable


def test_second_plan_computes_no_curves(model: nn.Module, x: Tensor) -> None:
    statistics, curves, computed = fxfact.calibrate(model, x.split(8)), ErrorCurveCache(), Computed()
    asked: dict[str, Any] = {"calibration": statistics, "example_inputs": x[:1], "progress": computed}
    first = fxfact.plan(model, ["channel_svd", "tucker"], budget=fxfact.Macs(0.8), error_curves=curves, **asked)
    assert (computed.count, len(curves)) == (3, 6)  # three convolutions
    again = fxfact.plan(model, ["channel_svd", "tucker"], budget=fxfact.Macs(0.8), error_curves=curves, **asked)
    fxfact.plan(model, "tucker", budget=fxfact.Params(0.6), error_curves=curves, **asked)
    assert (computed.count, len(curves)) == (3, 6)
    assert again == first == fxfact.plan(model, ["channel_svd", "tucker"], budget=fxfact.Macs(0.8), **asked)


def test_plan_without_a_cache_keeps_no_curves(model: nn.Module, x: Tensor) -> None:
    computed = Computed()
    for _ in range(2):
        fxfact.plan(model, "channel_svd", budget=fxfact.Macs(0.8), example_inputs=x[:1], progress=computed)
    assert computed.count == 6


def test_curves_are_found_again_only_for_the_same_weights(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    statistics, curves = fxfact.calibrate(model, x.split(8)), ErrorCurveCache()
    options: dict[str, Any] = {"budget": fxfact.Macs(0.8), "example_inputs": x[:1], "calibration": statistics}
    before = fxfact.plan(model, "channel_svd", error_curves=curves, **options)
    curves.save(tmp_path / "curves.json")
    loaded = ErrorCurveCache.load(tmp_path / "curves.json")
    assert {key: loaded[key] for key in loaded} == {key: curves[key] for key in curves}
    assert len(loaded) > 0
    with torch.no_grad():
        model.first.weight.copy_(model.first.weight[:1].expand_as(model.first.weight))
    again = fxfact.plan(model, "channel_svd", error_curves=curves, **options)
    assert again == fxfact.plan(model, "channel_svd", **options) != before
    assert len(curves) == len(loaded) + 1


def test_curves_are_found_again_only_for_the_same_statistics_and_options(model: nn.Module, x: Tensor) -> None:
    curves, computed = ErrorCurveCache(), Computed()
    asked: dict[str, Any] = {"budget": fxfact.Macs(0.8), "example_inputs": x[:1], "include": "first"}
    statistics = [fxfact.calibrate(model, batches) for batches in (x.split(8), (x + 0.01).split(8))]
    for calibration in (None, *statistics):
        for method in (Tucker(), Tucker(sweeps=1), ChannelSVD()):
            plan = fxfact.plan(model, method, calibration=calibration, error_curves=curves, progress=computed, **asked)
            assert plan == fxfact.plan(model, method, calibration=calibration, **asked)
    assert computed.count == len(curves) == 9


def test_curves_are_found_again_only_for_the_same_convolution() -> None:
    """Layers with equal weight values may have other groups or strides, and so other ranks."""
    weight = torch.randn(16, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    convs = [nn.Conv2d(4, 16, 3), nn.Conv2d(8, 16, 3, groups=2), nn.Conv2d(4, 16, 3, stride=4)]
    for conv in convs:
        conv.weight.data = weight.clone()
    curves = ErrorCurveCache()
    for conv in convs:
        model, x = nn.Sequential(conv).eval(), torch.zeros(1, conv.in_channels, 16, 16)
        for example_inputs in (x, None):
            asked: dict[str, Any] = {"budget": fxfact.Params(0.8), "example_inputs": example_inputs}
            plan = fxfact.plan(model, ["spatial_svd", "channel_svd"], error_curves=curves, **asked)
            assert plan == fxfact.plan(model, ["spatial_svd", "channel_svd"], **asked)


def test_cache_key_tells_apart_everything_that_a_curve_depends_on() -> None:
    ranks = [(1, 1), (2, 2)]
    keys = {
        cache_key(Tucker(), SPECS["plain"], ranks, "weight", "statistics"),
        cache_key(Tucker(sweeps=1), SPECS["plain"], ranks, "weight", "statistics"),
        cache_key(Tucker(), SPECS["strided"], ranks, "weight", "statistics"),
        cache_key(Tucker(), SPECS["plain"], ranks[:1], "weight", "statistics"),
        cache_key(Tucker(), SPECS["plain"], ranks, "other", "statistics"),
        cache_key(Tucker(), SPECS["plain"], ranks, "weight", "no statistics"),
    }
    assert len(keys) == 6
    assert cache_key(Tucker(), SPECS["plain"], ranks, "weight", "statistics") in keys


def test_weight_digest_depends_on_values_and_data_type() -> None:
    def digest(model: nn.Module) -> str:
        (candidate,) = draft_plan(capture(model, None), SearchScope()).candidates
        return candidate.weight_digest()

    conv = nn.Conv2d(4, 4, 3).half()
    first = digest(nn.Sequential(conv))
    assert digest(nn.Sequential(conv)) == first
    same_bytes = nn.Conv2d(4, 4, 3).bfloat16()
    same_bytes.weight.data = conv.weight.data.view(torch.bfloat16)
    assert digest(nn.Sequential(same_bytes)) != first
    conv.weight.data[0, 0, 0, 0] += 1
    assert digest(nn.Sequential(conv)) != first


def test_cache_survives_its_file(tmp_path: Path) -> None:
    cache = ErrorCurveCache()
    cache["a key"] = [((1, 2), 0.5), ((3, 4), 1e-30)]
    cache["another"] = [((1,), math.pi)]
    cache.save(tmp_path / "curves.json")
    loaded = ErrorCurveCache.load(tmp_path / "curves.json")
    assert list(loaded) == ["a key", "another"]
    assert len(loaded) == 2
    assert "a key" in loaded
    assert "no key" not in loaded
    assert [loaded[key] for key in loaded] == [cache[key] for key in cache]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"format": "fxfact error curves", "version": 1}',
        b'{"curves": {}}',
        b'{"format": "fxfact error curves", "version": 1, "curves": []}',
        b'{"format": "fxfact error curves", "version": 1, "curves": {"a": 5}}',
        b'{"format": "fxfact error curves", "version": 1, "curves": {"a": [[1, 0.5]]}}',
        b'{"format": "fxfact error curves", "version": 1, "curves": {"a": [[[1], "x"]]}}',
        b'{"format": "fxfact error curves", "version": 1, "curves": {"a": []}}',
        b'{"format": "fxfact error curves", "version": 1, "curves": {"a": [[[1], NaN]]}}',
    ],
)
def test_damaged_file_of_curves_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "curves.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"curves\.json: these are no error curves that can be read"):
        ErrorCurveCache.load(path)


@pytest.mark.parametrize("changed", [{"version": 2}, {"format": "fxfact plan"}])
def test_file_of_curves_of_another_version_is_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    path = tmp_path / "curves.json"
    ErrorCurveCache().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(PlanError, match=r"curves\.json: expected .*'version': 1.*, found .*Save the error curves"):
        ErrorCurveCache.load(path)


def test_file_of_curves_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="No such file"):
        ErrorCurveCache.load(tmp_path / "absent.json")
    with pytest.raises(PlanError, match="cannot be written there"):
        ErrorCurveCache().save(tmp_path / "absent" / "curves.json")


def test_error_curves_of_another_type_are_refused(model: nn.Module) -> None:
    with pytest.raises(fxfact.errors.ArgumentTypeError, match=r"must be a fxfact\.ErrorCurveCache, got dict"):
        fxfact.plan(model, budget=fxfact.Params(0.5), error_curves={})  # type: ignore[arg-type]
