"""What distillation achieves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from tests.support import FakeTimer, Small

pytestmark = pytest.mark.integration


def test_distillation_brings_a_network_closer_and_is_deterministic(model: nn.Module, x: Tensor) -> None:
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=x[:1])
    before = copy.deepcopy(small.state_dict())
    trained, report = fxfact.distill(small, model, x.split(4), steps=60, lr=3e-3)
    assert report.after < report.before
    assert report.steps <= 60
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert fxfact.plan_of(trained) == fxfact.plan_of(small)
    again, _ = fxfact.distill(small, model, x.split(4), steps=60, lr=3e-3)
    assert torch.equal(again(x), trained(x))


class ThreeInputs(nn.Module):
    """Takes maps, numbers, and the number of a row in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table, self.head = nn.Conv2d(4, 16, 3), nn.Embedding(5, 16), nn.Linear(18, 3)

    def forward(self, maps: Tensor, numbers: Tensor, row: Tensor) -> Tensor:
        return self.head(torch.cat([self.conv(maps).relu().mean((2, 3)) + self.table(row), numbers], 1))


@pytest.mark.parametrize("mixup", [True, False])
def test_mixup_mixes_all_tensors_of_a_sample_with_the_same_other_sample(mixup: bool, data: Tensor) -> None:
    torch.manual_seed(0)
    model, numbers = ThreeInputs().eval(), data[:, 0, 0, :2]
    batches = [(part, part[:, 0, 0, :2], torch.arange(8) % 5) for part in data.split(8)]
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=batches[0])
    inputs: list[tuple[Tensor, ...]] = []
    model.register_forward_pre_hook(lambda _, args: inputs.append(args))
    _, report = fxfact.distill(small, model, batches, steps=40, lr=1e-3, mixup=mixup)
    assert report.after < report.before
    parts = data.split(8)
    kept = [args for args in inputs if any(args[0].equal(part[: len(args[0])]) for part in parts)]
    mixed = [args for args in inputs if not any(args[0].equal(part[: len(args[0])]) for part in parts)]
    assert len(mixed) == (42 if mixup else 0)  # every step, and a mixture of the batch held out, read and measured
    assert len(kept) == (3 if mixup else 43)  # the batch held out is also read at another size
    for maps, drawn, rows in mixed:
        torch.testing.assert_close(maps[:, 0, 0, :2], drawn)
        assert rows.equal(batches[0][2])
        assert drawn.min() >= numbers.min()
        assert drawn.max() <= numbers.max()


def test_distillation_takes_an_iterator() -> None:
    class Sometimes(Small):
        """Calls one convolution for some batches only, and writes to its input."""

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(1.0)
            if x.mean() > 0:
                x = x + self.first(x)[:, :4]
            return self.head(torch.relu(self.second(self.norm(self.first(x)))).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Sometimes().eval(), torch.randn(32, 4, 10, 10)
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=x[:2])
    with torch.no_grad():
        _, report = fxfact.distill(small, model, (batch for batch in x.split(4)), steps=20)
    assert report.after < report.before


def test_distillation_of_a_network_for_inference_learns_as_much(small: Small, data: Tensor) -> None:
    with torch.no_grad():
        small.norm.running_var.uniform_(0.05, 0.1)
    own = fxfact.factorize(small, "tucker", rank=0.4, example_inputs=data[:2])
    folded = fxfact.for_inference(own, data[:2], timer=FakeTimer())
    learned = [fxfact.distill(each, small, data.split(8), steps=40, lr=1e-3)[1] for each in (own, folded)]
    assert learned[1].after < 0.5 * learned[1].before
    assert learned[1].after == pytest.approx(learned[0].after, rel=0.5)


def test_distillation_of_a_network_that_was_factorized_twice(small: Small, data: Tensor) -> None:
    once = fxfact.factorize(small, "tucker", rank=0.5, example_inputs=data[:2])
    twice = fxfact.factorize(once, "channel_svd", rank=0.5, example_inputs=data[:2], allow_growth=True)
    _, report = fxfact.distill(twice, once, data.split(8), steps=20)
    assert report.after <= report.before


@pytest.mark.parametrize("capture", ["trace", "modules"])
def test_distilled_network_is_verified(capture: Any, small: Small, data: Tensor) -> None:
    data = data + 1  # so that means differ
    made = fxfact.factorize(small, "tucker", rank=0.4, example_inputs=data[:2], capture=capture)
    changed, _ = fxfact.distill(made, small, data.split(8), steps=20, lr=1e-3)
    verified = fxfact.verify(small, changed, data)
    assert verified.ok
    assert "first.bias" in verified.changed
    assert "changed after factorization" in str(verified)
    changed.get_submodule("second.1").padding = (0, 0)
    assert not fxfact.verify(small, changed, data).ok
