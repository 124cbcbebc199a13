"""Plans that several processes make together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import fxfact
from tests.support import Classifier

pytestmark = pytest.mark.integration


def images(seed: int) -> Tensor:
    return torch.randn(24, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def plan_in_one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Classifier().eval()
    for name, held_out in (("alone", None), ("beside", images(1)[rank::2].split(2))):
        plan = fxfact.plan(
            model,
            ["tucker", "spatial_svd"],
            budget=fxfact.Macs(0.5),
            calibration=images(0)[rank::2].split(2),
            held_out=held_out,
            example_inputs=images(0)[:1],
        )
        plan.save(f"{folder}/{name}{rank}.json")
    dist.destroy_process_group()


def test_two_processes_measure_on_the_data_of_both(tmp_path: Path) -> None:
    mp.spawn(plan_in_one_of_two_processes, (str(tmp_path),), nprocs=2)
    for name in ("alone", "beside"):
        one, other = (fxfact.Plan.load(tmp_path / f"{name}{rank}.json") for rank in range(2))
        assert one == other
        assert one.measured_loss_increase is not None
        assert one.measured_on_held_out == (name == "beside")
