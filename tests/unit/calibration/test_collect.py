"""Statistics of a network: what is collected, and from which layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfact
from fxfact.calibration import MAX_SEED, generator_seed
from fxfact.errors import ArgumentError, CalibrationError
from tests.support import Classifier


def test_statistics_do_not_depend_on_batch_sizes_and_leave_the_model_unchanged(model: nn.Module, x: Tensor) -> None:
    before = copy.deepcopy(model.state_dict())
    one, other = fxfact.calibrate(model, x.split(24)), fxfact.calibrate(model, x.split(7))
    assert one.samples == other.samples == 24
    for path, metric in one.moments.items():
        for mine, theirs in zip(
            (metric.input, metric.output), (other.moments[path].input, other.moments[path].output), strict=True
        ):
            assert float((mine.factors[0] - theirs.factors[0]).norm()) <= 1e-6 * float(mine.factors[0].norm())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_loss_that_reaches_no_convolution_is_refused(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(CalibrationError, match="reach no convolution"):
        fxfact.calibrate(model, [x], likelihood=lambda output: torch.zeros((), requires_grad=True))


@pytest.mark.parametrize("seed", [-1, 2**40, "a", True])
def test_seed_must_be_an_int_within_bounds(model: nn.Module, x: Tensor, seed: Any) -> None:
    with pytest.raises(ArgumentError, match="seed must be an int"):
        fxfact.calibrate(model, [x], seed=seed)


def test_another_seed_draws_other_numbers_and_the_same_seed_the_same(model: nn.Module, x: Tensor) -> None:
    one, same, other = (fxfact.calibrate(model, [x], seed=seed) for seed in (3, 3, 4))
    for path, metric in one.moments.items():
        factors = [statistics.moments[path].output.factors[0] for statistics in (same, other)]
        assert torch.equal(metric.output.factors[0], factors[0])
        assert not torch.equal(metric.output.factors[0], factors[1])


def test_generator_seeds_differ_in_the_32_bits_that_generators_use() -> None:
    seeds = {generator_seed(seed, number) for seed in (0, 1, 2, MAX_SEED) for number in range(1000)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert generator_seed(0, 7) == 7


def test_weights_in_the_same_memory_have_their_own_statistics(x: Tensor) -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.same = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
            self.up = nn.ConvTranspose2d(8, 3, 3, padding=1)
            for other in (self.same, self.up):
                other.weight.data = self.down.weight.data

        def forward(self, x: Tensor) -> Tensor:
            return self.up(F.relu(self.down(x))) + self.up(F.relu(self.same(x + 1)))

    model = Autoencoder().eval()
    together = fxfact.calibrate(model, x.split(8), likelihood="gaussian").moments
    assert model.same.weight.data_ptr() == model.down.weight.data_ptr()
    for conv in (model.same, model.up):
        conv.weight.data = conv.weight.data.clone()
    apart = fxfact.calibrate(model, x.split(8), likelihood="gaussian").moments
    assert together.keys() == apart.keys() == {"down", "same", "up"}
    for path, metric in apart.items():
        for side in ("input", "output"):
            for one, other in zip(getattr(metric, side).factors, getattr(together[path], side).factors, strict=True):
                torch.testing.assert_close(one, other)


def test_weights_in_one_storage_are_told_apart(x: Tensor) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convs = [nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))]
        model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    apart = fxfact.calibrate(model, x.split(8))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    assert model[0].weight.untyped_storage()._cdata == model[1].weight.untyped_storage()._cdata
    together = fxfact.calibrate(model, x.split(8))
    assert list(together.moments) == ["0", "1", "2", "5"]
    for path, metric in apart.moments.items():
        torch.testing.assert_close(metric.input.factors[0], together.moments[path].input.factors[0])
        torch.testing.assert_close(metric.output.factors[0], together.moments[path].output.factors[0])
    for how in ("trace", "modules"):
        small = fxfact.factorize(model, "tucker", rank=0.5, example_inputs=x[:2], capture=how, verify=True)
        assert len(fxfact.plan_of(small).rewrites) == 3


def test_kernel_in_a_buffer_has_statistics(x: Tensor) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.randn(12, 3, 3, 3) / 5)
            self.head = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(F.conv2d(x, self.kernel)).mean((2, 3)))

    model = Fixed().eval()
    assert fxfact.calibrate(model, x.split(8)).moments.keys() == {"kernel", "head"}
    assert not model.kernel.requires_grad


class MixedPrecision(Classifier):
    """Uses autocast in its own forward()."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


def test_statistics_under_autocast_are_close_to_those_without(model: nn.Module, x: Tensor) -> None:
    mixed = MixedPrecision().eval()
    mixed.load_state_dict(model.state_dict())
    expected, found = (fxfact.calibrate(each, x.split(8), likelihood="gaussian") for each in (model, mixed))
    assert found.moments.keys() == expected.moments.keys()
    for path, metric in expected.moments.items():
        one, other = (m.input.factors[0] for m in (metric, found.moments[path]))
        assert float((one - other).norm()) < 0.02 * float(one.norm())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fxfact.plan(
            model, ["tucker", "tt"], budget=fxfact.Macs(0.6), calibration=expected, example_inputs=x[:1]
        )
    outside = fxfact.plan(model, ["tucker", "tt"], budget=fxfact.Macs(0.6), calibration=expected, example_inputs=x[:1])
    assert [decision.rank for decision in inside] == [decision.rank for decision in outside]


def test_nan_gradients_are_refused_and_calls_without_samples_are_harmless(x: Tensor) -> None:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rare, self.head = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z, chosen = y.clone(), y.mean((1, 2, 3)) > 1e9
            z[chosen] = self.rare(y[chosen])
            return self.head(z.var((2, 3)).sqrt())

    model = Spread().eval()
    assert list(fxfact.calibrate(model, x.split(8)).moments) == ["conv", "head"]
    blank = x.clone()
    blank[5] = 0  # the square root of its variance has no gradient
    with pytest.raises(CalibrationError, match=r"at conv an input or a gradient is NaN"):
        fxfact.calibrate(model, blank.split(8))


def test_first_sample_serves_as_example_inputs() -> None:
    class Untraceable(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) > -1e9 else -x)

    model, x = Untraceable().eval(), torch.randn(12, 3, 9, 9)
    assert (
        fxfact.calibrate(model, (part for part in x.split(4))).samples == 12
    )  # the first batch of a generator is not lost
    parts = ({"x": part, "labels": 0} for part in x.split(4))
    plan = fxfact.plan(model, "tucker", budget=fxfact.Macs(0.7), calibration=parts, held_out=[{"x": x, "labels": 0}])
    assert plan.capture == "modules"
    assert plan.compared
    assert plan.network.macs
    assert plan.predicted_loss_increase is not None
    assert plan.predicted_loss_increase > 0
    assert plan.measured_loss_increase is not None
