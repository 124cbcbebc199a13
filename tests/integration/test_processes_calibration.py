"""Calibration in several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import fxfact
from tests.support import Classifier

pytestmark = pytest.mark.integration


def plan_in_one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Classifier().eval()
    x = torch.randn(24, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    statistics = fxfact.calibrate(model, x[rank::2].split(5))
    statistics.save(f"{folder}/{rank}.npz")
    plan = fxfact.plan(model, budget=fxfact.Macs(0.6), calibration=statistics, example_inputs=x[:1])
    plan.save(f"{folder}/{rank}.json")
    dist.destroy_process_group()


def test_two_processes_give_the_plan_of_one(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    mp.spawn(plan_in_one_of_two_processes, (str(tmp_path),), nprocs=2)
    alone = fxfact.calibrate(model, x.split(8))
    plan = fxfact.plan(model, budget=fxfact.Macs(0.6), calibration=alone, example_inputs=x[:1])
    for rank in range(2):
        together = fxfact.Statistics.load(tmp_path / f"{rank}.npz")
        assert together.samples == alone.samples
        for path, metric in alone.moments.items():
            for side in ("input", "output"):
                mine, theirs = (getattr(m, side).factors[0] for m in (metric, together.moments[path]))
                assert float((mine - theirs).norm()) <= 1e-6 * float(mine.norm())
        found = fxfact.Plan.load(tmp_path / f"{rank}.json")
        assert [(d.factorization, d.rank) for d in found] == [(d.factorization, d.rank) for d in plan]
