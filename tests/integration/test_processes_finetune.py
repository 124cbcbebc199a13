"""Refitting and distillation in one of several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import fxfact
from tests.support import Small

pytestmark = pytest.mark.integration


def tune_in_one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(32, 4, 10, 10, generator=torch.Generator().manual_seed(0))
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=x[:2])
    if rank == 0:
        refitted, _ = fxfact.refit(small, model, x.split(8))
        trained, report = fxfact.distill(refitted, model, x.split(8), steps=12)
        torch.save([report.before, trained(x).detach()], f"{folder}/found.pt")
    dist.destroy_process_group()


def test_one_of_two_processes_may_refit_and_distill_alone(data: Tensor, tmp_path: Path) -> None:
    mp.spawn(tune_in_one_of_two_processes, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    model = Small().eval()
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=data[:2])
    refitted, _ = fxfact.refit(small, model, data.split(8))
    trained, report = fxfact.distill(refitted, model, data.split(8), steps=12)
    before, output = torch.load(tmp_path / "found.pt")
    assert before == pytest.approx(report.before, rel=1e-4)
    torch.testing.assert_close(output, trained(data), rtol=1e-3, atol=1e-4)
