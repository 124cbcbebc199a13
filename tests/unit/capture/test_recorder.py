"""The record of a run: which convolutions are called, and who else reads their weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfact
from fxfact.errors import CalibrationError
from tests.support import Branching, Small, apart, copied_state, factorized, has_state, skip_reasons


class Causal(nn.Conv1d):
    """Pads, then leaves the rest to PyTorch."""

    def forward(self, x: Tensor, shift: int = 0) -> Tensor:
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1) + shift, 0)))


class Masked(nn.Conv1d):
    """Calls the functional convolution on its own weight, and gives more than one output."""

    def forward(self, x: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        keep = torch.arange(x.shape[-1])[None] < length[:, None]
        x = F.conv1d(
            input=x * keep[:, None], weight=self.weight, bias=self.bias, stride=self.stride, padding=self.padding
        )
        return x, length // self.stride[0]


class Standardised(nn.Conv1d):
    """Computes its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight - self.weight.mean((1, 2), keepdim=True), self.bias)


class Otherwise(nn.Conv1d):
    """Convolves with another stride than its attributes say."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, self.bias, stride=2)


class Reading(nn.Conv1d):
    """Convolves as it should, and looks at its weight besides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.norm()


class Subclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.causal = Causal(8, 8, 3, dilation=2)
        self.masked = Masked(8, 8, 3, stride=2, padding=1)
        self.standardised = Standardised(8, 8, 3)
        self.otherwise = Otherwise(8, 8, 3)
        self.reading = Reading(8, 8, 3)
        self.never = Causal(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, length = self.masked(self.causal(x, shift=1), torch.tensor([9, 30]))
        return self.reading(self.otherwise(self.standardised(x[: len(length)])))


def test_record_tells_subclasses_that_only_convolve_from_others() -> None:
    torch.manual_seed(0)
    model, x = Subclasses(), torch.randn(2, 8, 40)
    result = factorized(model, x, capture="modules")
    left = skip_reasons(result)
    assert [d.path for d in fxfact.plan_of(result).rewrites] == ["causal", "masked", "otherwise"]
    assert str(fxfact.plan_of(result)["otherwise"].spec) == "Conv1d(8→8, 3, stride 2)"
    assert isinstance(result.causal, Causal)
    assert isinstance(result.masked, Masked)
    assert "also read by aten.mean" in left["standardised"]
    assert "also read by aten.linalg_vector_norm" in left["reading"]
    assert left["never"] == "forward does not call it"
    for network in (copy.deepcopy(result), torch.compile(result, backend="aot_eager")):
        assert apart(result(x), network(x)) < 1e-6
    assert apart(result(x), torch.export.export(result, (x,)).module()(x)) < 1e-6
    again = fxfact.apply(fxfact.plan_of(result), model)
    assert again(x).equal(result(x))


def test_record_notices_a_weight_that_is_used_elsewhere(image: Tensor) -> None:
    class Combined(Branching):
        """Makes one kernel of two, as braindecode does: neither module is called."""

        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Conv2d(12, 12, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.first(x if x.sum() > 1e9 else x + 1))
            kernel = torch.einsum("om,mikl->oikl", self.third.weight[:, :, 0, 0], self.second.weight)
            return F.conv2d(x, kernel, self.third.bias)

    result = factorized(Combined(), image)
    left = skip_reasons(result)
    assert [d.path for d in fxfact.plan_of(result).rewrites] == ["first"]
    assert "its weight is also read by" in left["second"]
    assert "its weight is also read by" in left["third"]
    assert "called as a function, with a weight that is computed" in left["forward"]


def test_record_notices_a_part_of_a_weight_that_forward_reads(color_images: Tensor) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x)) * self.two.weight[3:5].sum()

    model = Reading().eval()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    plan = fxfact.plan(model, "tucker", rank=0.5, example_inputs=color_images[:2], capture="modules")
    assert [decision.path for decision in plan.rewrites] == ["one"]
    assert "its weight is also read by" in plan["two"].reason


def test_record_notices_a_weight_that_forward_also_reads(image: Tensor) -> None:
    class Reads(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.second.weight.abs().mean()

    class ReadsAndBranches(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.second.weight.abs().mean()

    for model in (Reads().eval(), ReadsAndBranches().eval()):
        result = factorized(model, image)
        assert [d.path for d in fxfact.plan_of(result).rewrites] == ["first"]
        unseen = fxfact.factorize(model, capture="modules")  # without a run, the read is not noticed
        assert len(fxfact.plan_of(unseen).rewrites) == 2
        assert fxfact.verify(model, unseen, image).ok


@pytest.mark.parametrize("how", ["trace", "modules"])
def test_record_notices_a_weight_that_forward_returns(small: Small, image: Tensor, how: Any) -> None:
    class Returning(Small):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.second.weight

    model = Returning().eval()
    plan = fxfact.plan(model, rank=0.5, example_inputs=image, capture=how)
    assert [decision.path for decision in plan.rewrites] == ["first"]
    assert "is also" in plan["second"].reason


def test_record_accepts_a_forward_that_takes_gradients(image: Tensor) -> None:
    class Score(Small):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(super().forward(x).square().sum(), x)[0]

    model = Score().eval()
    before = copied_state(model)
    small = fxfact.factorize(model, "tucker", rank=0.5, example_inputs=image, verify=True)
    plan = fxfact.plan_of(small)
    plain = fxfact.plan(Small().eval(), "tucker", rank=0.5, example_inputs=image)
    assert [d.path for d in plan.rewrites] == [d.path for d in plain.rewrites]
    assert plan.rewrites
    assert plan.network.macs == (plain.network.macs or 0) + model.head.weight.numel()  # of gradients, those of `head`
    assert small(image).shape == model(image).shape
    assert has_state(model, before)
    with pytest.raises(CalibrationError, match="gradients of its own, plan without data"):
        fxfact.calibrate(model, [image], likelihood="gaussian")
