"""Which front end captures a model, and which models no front end takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfact
from fxfact.capture import capture
from fxfact.errors import CaptureError
from tests.support import Branching, FakeTimer, Small, factorized


def test_capture_says_why_the_requested_front_end_fails(image: Tensor) -> None:
    with pytest.raises(CaptureError, match=r"Branching cannot be captured. trace: torch\.fx cannot trace forward"):
        fxfact.factorize(Branching(), example_inputs=image, capture="trace")
    with pytest.raises(CaptureError, match=r"\. Use capture='auto' or 'modules'\.$"):
        fxfact.factorize(Branching(), example_inputs=image, capture="trace")
    with pytest.raises(CaptureError, match=r"\. Pass example_inputs, or use capture='modules'\.$"):
        fxfact.factorize(Branching())
    for inputs in (None, image.to("meta")):  # a model without values cannot be run
        model = Branching() if inputs is None else Branching().to("meta")
        with pytest.raises(CaptureError, match=r"\. Use capture='modules'\.$"):
            fxfact.plan(model, example_inputs=inputs, capture="trace")
        assert len(fxfact.plan(model, example_inputs=inputs, capture="modules").rewrites) == 2


def test_capture_selects_the_front_end_that_reaches_more_convolutions(small: Small, image: Tensor) -> None:
    small.first.register_forward_pre_hook(lambda module, args: None)
    plan = fxfact.plan(small, example_inputs=image)
    assert (plan.capture, len(plan.rewrites)) == ("modules", 2)
    assert plan.refused == ("trace: 2 layers, not 3",)
    assert len(fxfact.plan(small, example_inputs=image, capture="trace").rewrites) == 1


def test_capture_uses_modules_without_example_inputs_only_if_asked_to() -> None:
    class Causal(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (2, 0)))

    model = nn.Sequential(Branching(), Causal(5, 8, 3))
    with pytest.raises(CaptureError, match=r"cannot be captured\. trace: .* Pass example_inputs"):
        fxfact.plan(model)
    plan = fxfact.plan(model, capture="modules")
    assert (plan.capture, plan.compared) == ("modules", False)
    assert "not compared" in str(plan)
    assert "pass example_inputs" in plan["1"].reason


def test_capture_does_not_run_a_model_on_the_meta_device(image: Tensor) -> None:
    plan = fxfact.plan(Small().to("meta"), example_inputs=image.to("meta"))
    assert (len(plan.rewrites), plan.compared) == (2, False)
    assert plan.network.macs == capture(Small(), image).macs


def test_capture_names_meta_parameters_if_the_inputs_have_values(small: Small, image: Tensor) -> None:
    words = r"^{} of Small are on the meta device and have no values, but example_inputs are on cpu\. Move .*to_empty"
    with pytest.raises(CaptureError, match=words.format(r"first\.weight, first\.bias, norm\.weight and 7 more")):
        fxfact.plan(Small().to("meta"), example_inputs=image)
    small.second.to("meta")
    for how in ("auto", "trace", "modules"):
        with pytest.raises(CaptureError, match=words.format(r"second\.weight")):
            fxfact.plan(small, example_inputs={"x": image}, capture=how)


def test_capture_refuses_wrappers_and_says_what_to_pass(small: Small) -> None:
    for wrapped in (nn.DataParallel(small), torch.compile(small)):
        with pytest.raises(CaptureError, match="wraps the network: factorize what it wraps"):
            fxfact.factorize(wrapped)


def test_capture_refuses_sharded_models_and_says_when_to_factorize() -> None:
    class FSDPSmall(Small):
        """What torch.distributed.fsdp.fully_shard makes of a class is called so."""

    class FullyShardedDataParallel(nn.Sequential):
        """The wrapper of the older API."""

    whole, part = FSDPSmall(), nn.Sequential(FSDPSmall())  # fully_shard is usually called on the blocks too
    for model, place in ((whole, "the model"), (part, "0"), (FullyShardedDataParallel(Small()), "the model")):
        with pytest.raises(CaptureError, match=rf"^{place} is a F.*before fully_shard.*unsharded state"):
            fxfact.factorize(model)


def test_capture_skips_sparse_quantized_and_complex_weights(image: Tensor) -> None:
    sparse = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    sparse[0].weight = nn.Parameter(sparse[0].weight.detach().to_sparse())
    assert "sparse" in fxfact.plan(sparse)["0"].reason
    quantized = nn.Sequential(torch.ao.nn.quantized.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    assert "quantized" in fxfact.plan(quantized)["0"].reason
    assert len(fxfact.plan_of(fxfact.factorize(quantized)).rewrites) == 1
    plan = fxfact.plan(nn.Sequential(nn.Conv2d(4, 4, 3, dtype=torch.complex64)), example_inputs=image.to(torch.cfloat))
    assert "complex64" in plan["0"].reason

    class Sharded(torch.Tensor):
        pass

    sharded = nn.Sequential(nn.Conv2d(4, 4, 3))
    sharded[0].weight = nn.Parameter(torch.randn(4, 4, 3, 3).as_subclass(Sharded))
    assert fxfact.plan(sharded)["0"].reason == "its weight is a Sharded, not a plain tensor"


def test_capture_accepts_a_train_method_that_returns_nothing(image: Tensor) -> None:
    class Silent(Small):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)

    class Untraced(Silent, Branching):
        pass

    for model in (Silent(), Untraced()):
        budget = fxfact.Latency(1.0, timer=FakeTimer())
        made = [factorized(model, image), fxfact.factorize(model, "tucker", budget=budget, example_inputs=image)]
        assert [network(image).shape for network in made] == [model(image).shape] * 2
