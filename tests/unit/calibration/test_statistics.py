"""Statistics: files, digests, and use on other models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.errors import CalibrationError, PlanError
from tests.support import ENTRIES, with_entries


def test_statistics_from_a_file_give_the_same_plan_and_network(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    statistics = fxfact.calibrate(model, x.split(8))
    kinds = ["tucker", "spatial_svd"]
    plan = fxfact.plan(model, kinds, budget=fxfact.Macs(0.6), calibration=statistics, example_inputs=x[:1])
    statistics.save(tmp_path / "statistics.npz")
    plan.save(tmp_path / "plan.json")
    loaded = fxfact.Statistics.load(tmp_path / "statistics.npz")
    again = fxfact.plan(model, kinds, budget=fxfact.Macs(0.6), calibration=loaded, example_inputs=x[:1])
    assert again == plan == fxfact.Plan.load(tmp_path / "plan.json")
    one, other = (fxfact.apply(plan, model, calibration=each) for each in (statistics, loaded))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(PlanError, match="made with data"):
        fxfact.apply(plan, model)
    assert fxfact.apply(plan, model, weights="empty")
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match="broken"):
        fxfact.Statistics.load(tmp_path / "broken.npz")


@pytest.mark.parametrize("content", [b"", b"hello", b"{}"])
def test_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CalibrationError, match="this is not an archive of statistics"):
        fxfact.Statistics.load(tmp_path / "file")


@pytest.mark.parametrize("damage", ENTRIES)
def test_damaged_file_is_refused(model: nn.Module, x: Tensor, tmp_path: Path, damage: tuple[int, int]) -> None:
    path = tmp_path / "statistics"
    fxfact.calibrate(model, [x]).save(path)
    path.write_bytes(with_entries(path.read_bytes(), *damage))
    with pytest.raises(CalibrationError, match=r"the statistics cannot be read"):
        fxfact.Statistics.load(path)


def test_file_of_another_version_is_refused(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    fxfact.calibrate(model, [x]).save(tmp_path / "statistics.npz")
    with np.load(tmp_path / "statistics.npz") as file:
        arrays = dict(file)
    header = json.loads(arrays["header"].tobytes()) | {"version": 3}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez(tmp_path / "old.npz", **arrays)
    with pytest.raises(CalibrationError, match=r"old\.npz: expected .*'version': \d+.*, got .*version 3\. Recalibrate"):
        fxfact.Statistics.load(tmp_path / "old.npz")


def test_file_that_cannot_be_opened_is_refused(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="None: the statistics cannot be written"):
        fxfact.calibrate(model, [x]).save(None)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="No such file"):
        fxfact.Statistics.load(tmp_path / "nowhere.npz")


def test_batches_apply_a_plan_as_their_statistics_do(model: nn.Module, x: Tensor) -> None:
    statistics = fxfact.calibrate(model, [x])
    plan = fxfact.plan(model, rank=0.5, calibration=statistics)
    one, other = (fxfact.apply(plan, model, calibration=data) for data in (statistics, [x]))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(CalibrationError, match="must be an iterable of batches, got int"):
        fxfact.apply(plan, model, calibration=7)  # type: ignore[arg-type]


def test_statistics_of_another_model_do_not_apply_a_plan(model: nn.Module, x: Tensor) -> None:
    plan = fxfact.plan(model, rank=0.5, calibration=fxfact.calibrate(model, [x]))
    others = fxfact.calibrate(nn.Sequential(model).eval(), [x])
    with pytest.raises(CalibrationError, match="cover none of the layers"):
        fxfact.apply(plan, model, calibration=others)
    assert fxfact.apply(plan, model, calibration=others, weights="empty")
    with pytest.raises(PlanError, match="made without data"):
        fxfact.apply(fxfact.plan(model, rank=0.5), model, calibration=fxfact.calibrate(model, [x]))


def calibrated(x: Tensor) -> fxfact.Statistics:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), *head).eval()
    return fxfact.calibrate(model, x.split(4))


def test_digest_tells_statistics_apart(tmp_path: Path) -> None:
    x = torch.randn(12, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    statistics = calibrated(x)
    digests = {path: statistics.digest(path) for path in statistics.moments}
    assert set(digests) == {"0", "2", "5"}
    assert digests["0"] != digests["2"]
    assert all(len(digest) == 32 and int(digest, 16) >= 0 for digest in digests.values())
    assert {path: calibrated(x).digest(path) for path in digests} == digests
    statistics.save(tmp_path / "statistics.npz")
    loaded = fxfact.Statistics.load(tmp_path / "statistics.npz")
    assert {path: loaded.digest(path) for path in digests} == digests
    others = [
        calibrated(x + 0.01),
        replace(statistics, samples=13),
        replace(statistics, specs={path: replace(spec, bias=not spec.bias) for path, spec in statistics.specs.items()}),
    ]
    for path, digest in digests.items():
        assert len({digest, *(other.digest(path) for other in others)}) == 1 + len(others)
    assert statistics.digest("unknown") not in digests.values()
