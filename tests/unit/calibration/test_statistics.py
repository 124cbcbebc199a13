"""Statistics: their digests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import fxfact


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
    assert set(digests) == {"0", "2"}
    assert digests["0"] != digests["2"]
    assert all(len(digest) == 32 and int(digest, 16) >= 0 for digest in digests.values())
    assert {path: calibrated(x).digest(path) for path in digests} == digests
    statistics.save(tmp_path / "statistics.npz")
    loaded = fxfact.Statistics.load(tmp_path / "statistics.npz")
    assert {path: loaded.digest(path) for path in digests} == digests
    others = [
        calibrated(x + 0.01),
        replace(statistics, samples=13),
        replace(statistics, likelihood="gaussian"),
        replace(statistics, shrinkage=0.1),
        replace(
            statistics, specs={path: replace(spec, padding=((1, 1),) * 2) for path, spec in statistics.specs.items()}
        ),
    ]
    for path, digest in digests.items():
        assert len({digest, *(other.digest(path) for other in others)}) == 1 + len(others)
    assert statistics.digest("unknown") not in digests.values()
