"""Kernels are decomposed in other processes and on a cluster, with the same result."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.factorizations.cp import CPMobilenet

pytestmark = pytest.mark.integration


def seven_convs() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(6, 6, 3, padding=1) for _ in range(7)))


def have_equal_states(one: nn.Module, other: nn.Module) -> bool:
    return all(a.equal(b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_processes_decompose_to_the_same_network() -> None:
    model = seven_convs()
    random: dict[str, Any] = {"factorization": CPMobilenet(init="random", sweeps=3), "rank": 4, "allow_growth": True}
    alone = fxfact.factorize(model, **random, generator=torch.Generator().manual_seed(3))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        made = fxfact.factorize(
            model, **random, generator=torch.Generator().manual_seed(3), executor=processes, capture="modules"
        )
    assert have_equal_states(alone, made)


def test_processes_measure_the_same_plan(image: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.LazyLinear(5)).eval()
    model(image)
    asked: dict[str, Any] = {"budget": fxfact.Macs(0.6), "calibration": torch.randn(16, *image.shape[1:]).split(4)}
    asked["held_out"] = torch.randn(4, *image.shape[1:]).split(4)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
        plan = fxfact.plan(model, "channel_svd", executor=processes, **asked)
    assert plan == fxfact.plan(model, "channel_svd", **asked)


def test_processes_get_copies_and_return_plain_tensors() -> None:
    model = seven_convs()
    with torch.no_grad():  # all in one storage
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    view, place = model[0].weight.detach().numpy(), model[0].weight.data_ptr()
    before = view.copy()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        made = fxfact.factorize(model, rank=0.5, executor=processes)
    assert have_equal_states(made, fxfact.factorize(model, rank=0.5))
    assert model[0].weight.data_ptr() == place
    assert (view == before).all()
    assert not any(parameter.is_shared() for network in (model, made) for parameter in network.parameters())


def test_cluster_decomposes_to_the_same_network() -> None:
    distributed = pytest.importorskip("distributed", reason="pip install -e '.[cluster]'")
    model = seven_convs()
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        made = fxfact.factorize(model, executor=client.get_executor())
    assert have_equal_states(made, fxfact.factorize(model))
