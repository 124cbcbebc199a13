"""Plans that several processes make together."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import fxfact
from fxfact.errors import ArgumentError, MetricError
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
    given = {"calibration": images(0)[rank::2].split(2), "example_inputs": images(0)[:1]}
    metrics = {"scores": score, "number": lambda network, rank: float(score(network, rank).mean())}
    for name, measure in metrics.items():
        metric = fxfact.Metric(partial(measure, rank=rank), at_most_drop=10.0)
        fxfact.plan(model, "tucker", budget=metric, **given).save(f"{folder}/{name}{rank}.json")
    fails_in_one = fxfact.Metric(lambda network: score(network, rank) / (rank or 1 // rank), at_most_drop=1.0)
    with pytest.raises(MetricError, match="evaluate raised on the dense network: ZeroDivisionError"):
        fxfact.plan(model, "tucker", budget=fails_in_one, **given)
    timed = fxfact.Metric(partial(score, rank=rank), at_most_drop=1.0, minimise=fxfact.Latency)
    with pytest.raises(ArgumentError, match="each process measures times of its own"):
        fxfact.plan(model, "tucker", budget=timed, example_inputs=images(0)[:1])
    dist.destroy_process_group()


def score(network: nn.Module, rank: int) -> Tensor:
    """The scores of a process's samples, of which the first process has more."""
    return -network(images(2 + rank)[: 16 - 4 * rank]).square().mean(1)


def test_two_processes_measure_on_the_data_of_both(tmp_path: Path) -> None:
    mp.spawn(plan_in_one_of_two_processes, (str(tmp_path),), nprocs=2)
    for name in ("alone", "beside"):
        one, other = (fxfact.Plan.load(tmp_path / f"{name}{rank}.json") for rank in range(2))
        assert one == other
        assert one.measured_loss_increase is not None
        assert one.measured_on_held_out == (name == "beside")
    torch.manual_seed(0)
    model = Classifier().eval()
    scores = [score(model, rank).detach().double() for rank in range(2)]
    means = {"scores": torch.cat(scores).mean(), "number": torch.stack([part.mean() for part in scores]).mean()}
    for name, mean in means.items():
        one, other = (fxfact.Plan.load(tmp_path / f"{name}{rank}.json") for rank in range(2))
        assert one == other
        assert one.rewrites
        assert one.measured_points[0].metric == pytest.approx(float(mean), rel=1e-5)
