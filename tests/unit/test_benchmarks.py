"""The networks of the benchmarks are those that their data describes."""

from __future__ import annotations

import pytest

from benchmarks.networks import NETWORKS, data_folder
from benchmarks.tasks import TASKS

QUICK = ("fsdd_conv1d", "adrenal_conv3d", "lapsrn")


@pytest.mark.skipif(data_folder() is None, reason="data sets are missing: set FXFACT_DATA to their folder")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.integration]) for name in TASKS]
)
def test_dense_network_reaches_its_published_score(name: str) -> None:
    task = TASKS[name]
    assert task.score(NETWORKS[name].load()) == pytest.approx(task.dense, abs=0.06 if "%" in task.unit else 0.002)


def test_resnets_have_their_known_number_of_parameters() -> None:
    counts = {name: sum(p.numel() for p in NETWORKS[name].build().parameters()) for name in ("resnet18", "resnet50")}
    assert counts == {"resnet18": 11_689_512, "resnet50": 25_557_032}
