"""Repairs: what is solved for is exact, the mean is met, and a network that gets worse is given back as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import Small, random_input, random_layer
from torch import Tensor, nn

import fxfact
from fxfact.conv import ConvSpec, from_torch
from fxfact.conv_modules import spec_of, write_conv
from fxfact.errors import ArgumentError, CalibrationError
from fxfact.pairs import Pair
from fxfact.repairs import _seen, _sites


@pytest.fixture
def data() -> Tensor:
    return torch.randn(32, 4, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def factorized(small: Small, image: Tensor) -> nn.Module:
    return fxfact.factorize(small, "tucker", rank=0.4, example_inputs=image)


def test_a_repaired_network_is_nearer(small: Small, factorized: nn.Module, data: Tensor) -> None:
    before = copy.deepcopy(factorized.state_dict()), copy.deepcopy(small.state_dict())
    repaired, report = fxfact.repair(factorized, small, data.split(8))
    assert report.after < 0.9 * report.before
    assert report.paths == ("first", "second")
    for network, state in zip((factorized, small), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert repaired.state_dict().keys() == factorized.state_dict().keys()
    assert fxfact.plan_of(repaired) == fxfact.plan_of(factorized)
    again, _ = fxfact.repair(factorized, small, data.split(8))
    assert torch.equal(again(data), repaired(data))


def test_models_that_keep_their_python_are_repaired(small: Small, data: Tensor) -> None:
    swapped = fxfact.factorize(small, "tucker", rank=0.4, example_inputs=data[:2], capture="modules")
    traced = fxfact.factorize(small, "tucker", rank=0.4, example_inputs=data[:2], capture="trace")
    one, other = (fxfact.repair(each, small, data.split(8))[0] for each in (swapped, traced))
    assert torch.allclose(one(data), other(data), atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        ConvSpec.parse(6, 8, (1, 1)),
        ConvSpec.parse(6, 8, (3, 2), stride=2, padding=1, dilation=(1, 2), bias=True),
        ConvSpec.parse(6, 8, (3, 3), padding=1, groups=2, padding_mode="reflect"),
        ConvSpec.parse(6, 4, (3, 2), stride=2, padding=1, output_padding=1, transposed=True, groups=2),
        ConvSpec.parse(6, 4, 4, order=1, padding="same"),
        ConvSpec.parse(4, 6, (1, 3, 3), stride=(2, 1, 1)),
    ],
    ids=str,
)
def test_what_is_seen_times_the_weight_is_the_output(spec: ConvSpec) -> None:
    layer, x = random_layer(spec), random_input(spec, batch=(9,))
    *pads, stage = write_conv(spec, layer.weight, layer.bias)
    x = nn.Sequential(*pads)(x)
    output = stage(x).flatten(2)
    rows = torch.cat(list(_seen(stage, x, 0)))
    own = spec_of(stage)
    matrix = from_torch(own, stage.weight).reshape(own.groups, own.out_channels // own.groups, -1)
    product = torch.einsum("npgs,gos->npgo", rows.unflatten(2, (own.groups, -1)), matrix).flatten(2)
    product = product if stage.bias is None else product + stage.bias
    if rows.shape[1] == output.shape[2]:
        torch.testing.assert_close(product.mT, output)
    else:  # every one of the positions looked at is one of the output's
        nearest = torch.cdist(product, output.mT, compute_mode="donot_use_mm_for_euclid_dist").min(dim=2).values
        assert float(nearest.max()) < 1e-9 * float(output.norm())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_the_mean_behind_a_convolution_without_bias_is_met_by_its_norm() -> None:
    torch.manual_seed(0)
    model = Normed().eval()
    x = 1 + torch.randn(16, 4, 7, 7)  # with 25 positions, all of which are looked at
    small = fxfact.factorize(model, "channel_svd", rank=0.5, example_inputs=x)
    seen: dict[str, Tensor] = {}

    def mean_of(network: nn.Module) -> Tensor:
        handle = network.get_submodule("norm").register_forward_hook(lambda m, a, output: seen.update(y=output))
        network(torch.cat([x[:12]]))
        handle.remove()
        return seen["y"].mean((0, 2, 3))

    repaired, report = fxfact.repair(small, model, x.split(4), refit=False)
    assert report.paths == ("conv",)
    assert not torch.allclose(mean_of(small), mean_of(model), atol=1e-2)
    torch.testing.assert_close(mean_of(repaired), mean_of(model), rtol=1e-4, atol=1e-5)
    assert torch.equal(repaired.get_submodule("norm").running_var, model.norm.running_var)


class Shared(Small):
    """With convolutions that no repair reaches, and that drown what repairs of the others do."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(12, 12, 3, bias=False)
        self.once_more = nn.Conv2d(12, 12, 3, bias=False)
        self.once_more.weight = self.again.weight
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.norm(self.first(x)).relu(), self.kernel)
        return self.head(self.once_more(self.again(self.second(x).relu())).mean((2, 3)))


def test_shared_weights_and_functions_stay_and_what_gets_worse_is_given_back_as_it_was() -> None:
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(96, 4, 18, 18)
    small = fxfact.factorize(model, "tucker", rank=0.6, example_inputs=x[:2])
    assert {"kernel", "again", "once_more"} <= {decision.path for decision in fxfact.plan_of(small).rewrites}
    pair = Pair(small, model, x.split(24), example_inputs=None, likelihood=None)
    assert [site.path for site in _sites(pair, 0)] == ["first", "second"]
    repaired, report = fxfact.repair(small, model, x.split(24))
    assert (report.after, report.paths) == (report.before, ())
    assert torch.equal(repaired(x), small(x))


def test_bad_requests(small: Small, factorized: nn.Module, data: Tensor) -> None:
    with pytest.raises(ArgumentError, match="nothing to do"):
        fxfact.repair(factorized, small, data.split(8), refit=False, means=False)
    with pytest.raises(CalibrationError, match="two at least"):
        fxfact.repair(factorized, small, [data])
