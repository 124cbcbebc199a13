"""A forward that changes parameters, in one mode or in both: every front end refuses it and names the parameter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxfact
from fxfact.errors import CaptureError
from tests.support import Small, copied_state, factorized, has_state


class Momentum(nn.Module):
    """Updates its second encoder by the first one, in training mode."""

    def __init__(self, way: str, order: int = 2, *, transposed: bool = False) -> None:
        super().__init__()
        names = ("ConvTranspose" if transposed else "Conv") + f"{order}d"
        self.query, self.key = getattr(nn, names)(4, 6, 3), getattr(nn, names)(4, 6, 3)
        self.way = way

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.update()
        return self.query(x), self.key(x)

    def update(self) -> None:
        pairs = list(zip(self.query.parameters(), self.key.parameters(), strict=True))
        if self.way == "no_grad":
            with torch.no_grad():
                for ours, theirs in pairs:
                    theirs.mul_(0.5).add_(ours, alpha=0.5)
        elif self.way == "data":
            for ours, theirs in pairs:
                theirs.data = theirs.data * 0.5 + ours.data * 0.5
        elif self.way == "copy":
            self.key.weight.data.copy_(self.query.weight.data)
        elif self.way == "view":
            self.key.weight.detach().flatten()[:3].mul_(0.5)
        elif self.way == "state dict":
            self.key.load_state_dict(self.query.state_dict())
        elif self.way == "new parameter":
            self.key.weight = nn.Parameter(self.query.weight.detach().clone())
        elif self.way == "requires_grad":
            self.key.requires_grad_(False)


WAYS = ["no_grad", "data", "copy", "view", "state dict", "new parameter", "requires_grad"]


@pytest.mark.parametrize("how", ["auto", "trace", "modules"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [True, False])
def test_forward_that_changes_parameters_in_training_mode_is_refused(way: str, how: Any, training: bool) -> None:
    model, x = Momentum(way).train(training), torch.randn(2, 4, 9, 9)
    before = copied_state(model)
    words = r"key\.(weight|bias): forward changes this parameter.*training loop"
    if how == "trace" and way in ("state dict", "new parameter", "no_grad", "data"):
        words += "|torch.fx cannot trace forward|turns gradients off|sets the attribute"
    with pytest.raises(CaptureError, match=words):
        fxfact.factorize(model, rank=0.5, example_inputs=x, capture=how)
    with pytest.raises(CaptureError):
        fxfact.plan(model)
    assert has_state(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("order", "transposed"), [(1, False), (3, False), (2, True)])
def test_model_that_cannot_be_traced_is_refused_too(order: int, transposed: bool) -> None:
    class Untraced(Momentum):
        def forward(self, x: Tensor) -> Any:
            return super().forward(-x if x.mean() > 100 else x)

    x = torch.randn(2, 4, *[9] * order)
    for training in (True, False):
        model = Untraced("copy", order, transposed=transposed).train(training)
        with pytest.raises(CaptureError, match=r"^key\.weight: forward changes this parameter"):
            fxfact.plan(model, example_inputs=x)


def test_writes_in_a_graph_are_refused() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3)

        def forward(self, x: Tensor) -> Any:
            self.conv.weight.data.mul_(x.mean())
            return self.conv(x)

    model, x = Writing(), torch.randn(2, 4, 9, 9)
    for network in (model, fx.symbolic_trace(model)):
        for inputs in (None, x):
            with pytest.raises(CaptureError, match=r"conv\.weight: forward changes this parameter"):
                fxfact.plan(network, example_inputs=inputs)


@pytest.mark.parametrize("way", ["no_grad", "view"])
@pytest.mark.parametrize("decomposed", [True, False])
def test_exported_program_that_changes_parameters_is_refused(way: str, decomposed: bool) -> None:
    program = torch.export.export(Momentum(way).train(), (torch.randn(2, 4, 9, 9),))
    program = program.run_decompositions() if decomposed else program
    with pytest.raises(CaptureError, match=r"key\.\w+: forward changes this parameter"):
        fxfact.plan(program)
    assert len(fxfact.plan(torch.export.export(Momentum(way).eval(), (torch.randn(2, 4, 9, 9),)))) == 2


def test_averages_in_buffers_are_accepted(image: Tensor) -> None:
    class Averaging(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("average", torch.zeros(5))

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if self.training:
                self.average.lerp_(y.detach().mean(0), 0.1)
            return y

    for training in (True, False):
        model = Averaging().train(training)
        result = factorized(model, image)
        assert fxfact.plan_of(result).capture == "modules"
        assert float(result.norm.num_batches_tracked) == 0
        result.train()(image)
        assert result.average.abs().sum() > 0


def test_model_that_does_not_run_in_training_mode_is_accepted() -> None:
    class Untraced(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(-x if x.mean() > 100 else x)

    model = Untraced().eval()
    x = torch.randn(1, 4, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        copy.deepcopy(model).train()(x)
    assert fxfact.plan(model, example_inputs=x).capture == "modules"


class Codebook(nn.Module):
    """Moves a table towards its input in training, as vector quantizers do, and has a convolution beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(4, 8, 3), nn.Embedding(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.training:
            with torch.no_grad():
                self.table.weight.mul_(0.9).add_(x.mean((2, 3)).mean(0), alpha=0.1)
        return x + self.table.weight[0].reshape(1, 8, 1, 1)


def test_other_parameters_may_change_in_the_mode_that_the_model_is_not_in(image: Tensor) -> None:
    model = Codebook().eval()
    small = fxfact.factorize(model, "tucker", rank=0.5, example_inputs=image, verify=True)
    assert fxfact.plan_of(small).capture == "modules"
    assert len(fxfact.plan_of(small).rewrites) == 1
    before = small.table.weight.detach().clone()
    small.train()(image)
    assert not small.table.weight.equal(before)  # the network's own Python goes on
    with pytest.raises(CaptureError, match=r"table\.weight: forward changes this parameter"):
        fxfact.factorize(model.train(), "tucker", rank=0.5, example_inputs=image)
