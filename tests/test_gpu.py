"""On a GPU: what is right on the processor is right there, in every precision, and times are those of its kernels."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.conv import ConvSpec, write_conv
from fxfact.factorizations import Factorization
from fxfact.search.latency_cache import describe_machine
from fxfact.utils import milliseconds, milliseconds_of_graphs
from tests.support import EVERY_STAGE, Small, apart, by_name, quick, random_input, random_layer

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA GPU", allow_module_level=True)

GPU = torch.device("cuda")
DTYPES = {torch.float64: 1e-10, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}  # TF32, by default


@pytest.fixture
def data() -> Tensor:
    return torch.randn(64, 4, 10, 10, generator=torch.Generator().manual_seed(3))


class Wide(nn.Module):
    """Enough work that chains can pay."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 256, 3, padding=1)
        self.second = nn.Conv2d(256, 256, 3, padding=1)
        self.third = nn.Conv2d(256, 256, 3, padding=1)
        self.norm = nn.BatchNorm2d(256)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.second(torch.relu(self.first(x)))))
        return self.head(torch.relu(self.third(x)).mean((2, 3)))


@pytest.fixture
def wide() -> Wide:
    torch.manual_seed(0)
    return Wide().eval().to(GPU, torch.bfloat16)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(4)).to(GPU, torch.bfloat16)


@pytest.fixture(autouse=True)
def times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXFACT_CACHE", str(tmp_path / "times"))


@pytest.mark.parametrize("factorization", EVERY_STAGE, ids=by_name)
def test_every_convolution_is_what_it_is_on_the_processor(spec: ConvSpec, factorization: Factorization) -> None:
    layer = random_layer(spec)
    model, x = nn.Sequential(*write_conv(spec, layer.weight, layer.bias)), random_input(spec)
    small = fxfact.factorize(model.to(GPU), quick(factorization), rank="same", allow_growth=True, verify=True,
                             example_inputs=x.to(GPU))  # fmt: skip
    assert all(tensor.device.type == "cuda" for tensor in small.state_dict().values())
    found = small(x.to(GPU))
    assert apart(copy.deepcopy(small).cpu()(x), found.cpu()) < 1e-10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factorization", ["tucker", "channel_svd", "spatial_svd", "cp", "tt"])
def test_every_precision(small: Small, image: Tensor, dtype: torch.dtype, factorization: str) -> None:
    model, x = small.to(GPU, dtype), image.to(GPU, dtype)
    made = fxfact.factorize(model, factorization, rank=0.6, example_inputs=x, verify=True)
    assert fxfact.plan_of(made).rewrites
    assert {(t.device.type, t.dtype) for t in made.parameters()} == {("cuda", dtype)}
    on_cpu = copy.deepcopy(made).cpu().double()
    assert apart(on_cpu(x.cpu().double()), made(x).cpu()) < DTYPES[dtype]
    last = made.to(memory_format=torch.channels_last)
    assert apart(on_cpu(x.cpu().double()), last(x.to(memory_format=torch.channels_last)).cpu()) < DTYPES[dtype]


def test_autocast_and_training(small: Small, image: Tensor) -> None:
    made = fxfact.factorize(small.to(GPU).train(), "tucker", rank=0.6, example_inputs=image.to(GPU))
    with torch.autocast("cuda", torch.bfloat16):
        output = made(image.to(GPU))
        output.float().square().mean().backward()
    assert output.dtype == torch.bfloat16
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_statistics_and_plans_are_those_of_the_processor(small: Small, data: Tensor) -> None:
    kept, held_out = data.double().split(48)
    given: dict[str, Any] = {"calibration": kept.split(16), "held_out": [held_out], "likelihood": "categorical"}
    model = small.double()
    on_cpu = fxfact.calibrate(model, data.double().split(16), likelihood="categorical")
    on_gpu = fxfact.calibrate(copy.deepcopy(model).to(GPU), data.double().split(16), likelihood="categorical")
    for path, metric in on_cpu.moments.items():
        for ours, theirs in ((metric.input, on_gpu.moments[path].input), (metric.output, on_gpu.moments[path].output)):
            for a, b in zip(ours.factors, theirs.factors, strict=True):
                assert apart(a, b.cpu()) < 1e-6
    plan = fxfact.plan(model, budget=fxfact.Macs(0.6), **given)
    found = fxfact.plan(copy.deepcopy(model).to(GPU), budget=fxfact.Macs(0.6), **given)
    assert [(d.path, d.rewrite) for d in found] == [(d.path, d.rewrite) for d in plan]
    assert plan.measured_loss_increase is not None
    assert found.measured_loss_increase == pytest.approx(plan.measured_loss_increase, rel=1e-3)


def test_the_same_seed_gives_the_same_network_bit_by_bit(small: Small, data: Tensor) -> None:
    model = small.to(GPU)
    made = [fxfact.factorize(model, budget=fxfact.Macs(0.6), calibration=data.split(16)) for _ in range(2)]
    states = [network.state_dict() for network in made]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_network_is_refitted_and_distilled(small: Small, data: Tensor) -> None:
    model = small.to(GPU)
    made = fxfact.factorize(model, budget=fxfact.Macs(0.5), calibration=data.split(16))
    refitted, report = fxfact.refit(made, model, data.split(16))
    assert report.after <= report.before
    trained, learned = fxfact.distill(refitted, model, data.split(16), steps=20)
    assert learned.after <= learned.before
    assert all(tensor.device.type == "cuda" for tensor in trained.state_dict().values())


def test_files_come_back_on_the_model_s_device(small: Small, image: Tensor, tmp_path: Path) -> None:
    model, x = small.to(GPU), image.to(GPU)
    made = fxfact.factorize(model, "tucker", rank=0.6)
    fxfact.save(made, tmp_path / "made.pt")
    again = fxfact.load(tmp_path / "made.pt", model)
    assert torch.equal(again(x), made(x))
    program = fxfact.factorize(torch.export.export(model, (x,)), "tucker", rank=0.6, verify=True)
    fxfact.save(program, tmp_path / "made.pt2")
    torch.testing.assert_close(fxfact.load(tmp_path / "made.pt2", None).module()(x), program.module()(x))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compilers_take_it(small: Small, image: Tensor, mode: str) -> None:
    model, x = small.to(GPU), image.to(GPU)
    made = fxfact.factorize(model, "tucker", rank=0.6)
    backend = torch.compile(model, backend="fxfact", options={"factorization": "tucker", "rank": 0.6})
    with torch.no_grad():
        compiled = torch.compile(made, fullgraph=True, mode=mode)
        for _ in range(3):
            assert apart(made(x), compiled(x).clone()) < DTYPES[torch.float32]
        assert apart(made(x), backend(x)) < DTYPES[torch.float32]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_budget_of_milliseconds(wide: Wide, images: Tensor, tmp_path: Path, compiled: bool) -> None:
    names = ["tucker", "channel_svd"]
    made = fxfact.factorize(wide, names, budget=fxfact.Latency(0.9, compiled=compiled), example_inputs=images)
    plan = fxfact.plan_of(made)
    assert plan.measured_ms is not None
    assert plan.measured_ms[1] <= plan.measured_ms[0]
    assert plan.network.ms is not None
    assert made(images).shape == (16, 10)
    if not plan.rewrites:
        assert apart(wide(images), made(images)) < DTYPES[torch.bfloat16]
    assert list(tmp_path.glob("times/*.json"))


def test_graphs_are_timed_without_their_launches(images: Tensor) -> None:
    few = torch.ones(8, device=GPU)

    def call() -> None:
        for _ in range(50):
            few.add(1)

    assert min(milliseconds_of_graphs([call], GPU)[0]) < min(milliseconds([call])[0])
    assert describe_machine(GPU)["device"] == torch.cuda.get_device_name()
    assert describe_machine(GPU) != describe_machine(torch.device("cpu"))


def test_what_does_not_fit_is_an_error_of_ours() -> None:
    def call() -> None:
        torch.empty(2**45, device=GPU)

    for timed in (milliseconds, partial(milliseconds_of_graphs, device=GPU)):
        with pytest.raises(fxfact.errors.TimingError, match="did not run"):
            timed([call])
