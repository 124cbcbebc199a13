"""Captured networks are compared with the model."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxfact
from fxfact.capture import capture
from fxfact.capture.recorder import ModuleRecord, record_modules
from fxfact.errors import CaptureError
from tests.support import Branching, Small, factorized


def test_mistrace_is_refused(image: Tensor) -> None:
    class Lucky(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2 if isinstance(x, Tensor) else x)  # a Proxy is no Tensor

    model = Lucky().eval()
    with pytest.raises(CaptureError, match="trace: its output differs from the model's"):
        fxfact.factorize(model, example_inputs=image, capture="trace")
    result = factorized(model, image)
    assert fxfact.plan_of(result).capture == "modules"
    assert "output differs" in fxfact.plan_of(result).refused[0]


def test_mistrace_that_only_random_inputs_show_is_refused(image: Tensor) -> None:
    class Lucky(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.abs() if isinstance(x, Tensor) else x)

    assert fxfact.plan(Lucky().eval(), example_inputs=image.abs()).capture == "modules"


def test_models_that_fail_or_are_not_deterministic_are_refused(image: Tensor) -> None:
    class Failing(Small):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("not today\nnor tomorrow")

    class Unsteady(Small):
        seen = random.Random(0)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + self.seen.random())

    with pytest.raises(CaptureError, match=r"Failing fails on example_inputs: not today\. Pass inputs"):
        fxfact.factorize(Failing(), example_inputs=image)
    with pytest.raises(CaptureError, match="two runs of Unsteady from one seed differ: its output differs"):
        fxfact.factorize(Unsteady(), example_inputs=image)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.zeros(1, 3, 8, 8), "fails on example_inputs: Given groups=1"),
        (torch.zeros(1, 4, 8, 8, device="meta"), "fails on example_inputs"),
        ({"y": torch.zeros(1)}, "do not fit"),
        ((torch.zeros(1), torch.zeros(1)), "do not fit"),
    ],
)
def test_example_inputs_that_do_not_fit_are_refused(small: Small, inputs: object, words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        fxfact.plan(small, example_inputs=inputs)  # type: ignore[arg-type]


def test_nondeterministic_model_is_told_apart_from_a_mistrace(image: Tensor) -> None:
    counter = itertools.count()

    class Unsteady(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if isinstance(x, fx.Proxy) else next(counter))

    with pytest.raises(CaptureError, match="trace: two runs of Unsteady from one seed differ"):
        fxfact.plan(Unsteady(), example_inputs=image, capture="trace")


def test_output_without_tensors_cannot_be_compared(image: Tensor) -> None:
    class Hidden(Small):
        def forward(self, x: Tensor) -> None:
            super().forward(x)

    with pytest.raises(CaptureError, match="Hidden cannot be compared: its output holds no tensors"):
        fxfact.plan(Hidden(), example_inputs=image)


def test_calls_are_recorded_only_for_the_front_end_modules(image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[nn.Module] = []

    def counting(network: nn.Module, example_inputs: Any) -> ModuleRecord:
        recorded.append(network)
        return record_modules(network, example_inputs)

    monkeypatch.setattr("fxfact.capture.equivalence.record_modules", counting)
    assert capture(Small(), image).frontend == "trace"
    assert recorded == []
    assert capture(Branching(), image).frontend == "modules"
    assert len(recorded) == 1


@pytest.mark.parametrize("leaf", ["plain", "with a state", "with a hook"])
def test_comparison_leaves_the_graph_as_it_is(image: Tensor, leaf: str) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.calls: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(0)
            self.count.add_(1)
            return x

    class Holding(Small):
        def __init__(self) -> None:
            super().__init__()
            self.inside = Counting() if leaf == "with a state" else nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.inside(x))

    model = Holding().train()
    calls: list[int] = []
    if leaf == "with a hook":
        model.inside.register_forward_hook(lambda module, args, output: calls.append(0))
    network: Any = capture(model, image, how="trace", leaf_modules="inside").network
    assert network.inside is not model.inside
    assert all(module.training for module in network.modules())
    if leaf == "with a state":
        assert (float(network.inside.count), network.inside.calls) == (0, [])


def test_comparison_restores_buffers_that_a_graph_writes_to(image: Tensor) -> None:
    model = fx.symbolic_trace(Small())
    model.register_buffer("seen", torch.zeros(()))
    output = model.graph.output_node()
    with model.graph.inserting_before(output):
        count = model.graph.call_method("add_", (model.graph.get_attr("seen"), 1))
        output.args = (model.graph.call_function(torch.add, (output.args[0], count)),)
    model.recompile()
    network: Any = capture(model, image).network
    assert float(network.seen) == float(model.seen) == 0
