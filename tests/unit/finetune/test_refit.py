"""Repairs: what is solved for is exact, the mean is met, and a network that gets worse is given back as it was."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tests.support import Small, random_input, random_layer
from torch import Tensor, nn

import fxfact
from fxfact.conv import ConvSpec, from_torch, spec_of, write_conv
from fxfact.errors import ArgumentError, ArgumentTypeError, CalibrationError, PlanError
from fxfact.finetune.least_squares import LeastSquaresStats, solve_last_stage
from fxfact.finetune.patches import iter_patches as _seen
from fxfact.finetune.refit import _sites
from fxfact.finetune.teacher_student import TeacherStudent


@pytest.fixture
def data() -> Tensor:
    return torch.randn(32, 4, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def factorized(small: Small, image: Tensor) -> nn.Module:
    return fxfact.factorize(small, "tucker", rank=0.4, example_inputs=image)


def test_a_repaired_network_is_nearer(small: Small, factorized: nn.Module, data: Tensor) -> None:
    before = copy.deepcopy(factorized.state_dict()), copy.deepcopy(small.state_dict())
    repaired, report = fxfact.refit(factorized, small, data.split(8))
    assert report.after < 0.9 * report.before
    assert report.paths == ("first", "second")
    for network, state in zip((factorized, small), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert repaired.state_dict().keys() == factorized.state_dict().keys()
    assert fxfact.plan_of(repaired) == fxfact.plan_of(factorized)
    again, _ = fxfact.refit(factorized, small, data.split(8))
    assert torch.equal(again(data), repaired(data))


def test_models_that_keep_their_python_are_repaired(small: Small, data: Tensor) -> None:
    swapped = fxfact.factorize(small, "tucker", rank=0.4, example_inputs=data[:2], capture="modules")
    traced = fxfact.factorize(small, "tucker", rank=0.4, example_inputs=data[:2], capture="trace")
    one, other = (fxfact.refit(each, small, data.split(8))[0] for each in (swapped, traced))
    assert torch.allclose(one(data), other(data), atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        ConvSpec.parse(6, 8, (1, 1)),
        ConvSpec.parse(6, 8, (3, 2), stride=2, padding=1, dilation=(1, 2), bias=True),
        ConvSpec.parse(6, 8, (3, 3), padding=1, groups=2, padding_mode="reflect"),
        ConvSpec.parse(6, 4, (3, 2), stride=2, padding=1, output_padding=1, transposed=True, groups=2),
        ConvSpec.parse(4, 6, (3, 1), stride=(1, 3), padding=1, dilation=(2, 1), transposed=True, bias=True),
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

    repaired, report = fxfact.refit(small, model, x.split(4), last_stages=False)
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
    x[:72] += 3
    x[72:] -= 3  # the batch that is held out
    small = fxfact.factorize(model, "tucker", rank=0.6, example_inputs=x[:2])
    assert {"kernel", "again", "once_more"} <= {decision.path for decision in fxfact.plan_of(small).rewrites}
    pair = TeacherStudent(small, model, x.split(24), example_inputs=None, likelihood=None)
    assert [site.path for site in _sites(pair, 0)] == ["first", "second"]
    repaired, report = fxfact.refit(small, model, x.split(24))
    assert (report.after, report.paths) == (report.before, ())
    assert torch.equal(repaired(x), small(x))


def test_what_comes_next_may_write_to_the_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(inplace=True), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 3)
    ).eval()
    x = torch.randn(16, 4, 6, 6)  # with 16 positions, all of which are looked at
    small = fxfact.factorize(model, "channel_svd", rank=0.5, example_inputs=x)
    (site,) = _sites(TeacherStudent(small, model, x.split(4), example_inputs=None, likelihood=None), 0)
    torch.testing.assert_close(torch.cat([rows for calls in site.wanted for rows in calls]), _rows(model[0], x[:12]))
    assert site.norm is None  # it takes what the activation made of the output, in the same tensor


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).detach().flatten(2).mT


class Sometimes(Small):
    """Calls one convolution only for some batches, and writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.0)
        if x.mean() > 0:
            x = x + self.first(x)[:, :4]
        return self.head(torch.relu(self.second(self.norm(self.first(x)))).mean((2, 3)))


def test_calls_that_differ_from_batch_to_batch_and_batches_that_come_once() -> None:
    torch.manual_seed(0)
    model, x = Sometimes().eval(), torch.randn(32, 4, 10, 10)
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=x[:2])
    before = x.clone()
    with torch.inference_mode():
        repaired, report = fxfact.refit(small, model, (batch for batch in x.split(4)))
    assert report.after <= report.before
    assert torch.equal(x, before)
    assert not any(parameter.is_inference() for parameter in repaired.parameters())
    with torch.no_grad():
        _, recovery = fxfact.distill(small, model, (batch for batch in x.split(4)), steps=20)
    assert recovery.after < recovery.before


def test_what_augment_writes_to_is_not_the_callers(small: Small, factorized: nn.Module, data: Tensor) -> None:
    def blanked(maps: Tensor) -> Tensor:
        assert not bool((maps[..., :3, :3] == 0).all())
        maps[..., :3, :3] = 0
        return maps

    before = data.clone()
    fxfact.distill(factorized, small, data.split(8), steps=12, augment=blanked)
    assert torch.equal(data, before)


def test_models_that_run_without_gradients_are_repaired_and_not_trained(data: Tensor) -> None:
    class Frozen(Small):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Inside(Small):
        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                x = self.first(x)
            return self.head(torch.relu(self.second(self.norm(x.clone()))).mean((2, 3)))

    for kind in (Frozen, Inside):
        torch.manual_seed(0)
        model = kind().eval()
        small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=data[:2])
        _, report = fxfact.refit(small, model, data.split(8))
        assert report.after < report.before
    model = Frozen().eval()
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=data[:2])
    with pytest.raises(ArgumentError, match="no gradient leads from the output to the parameters"):
        fxfact.distill(small, model, data.split(8))


def _one_alone(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(32, 4, 10, 10, generator=torch.Generator().manual_seed(0))
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=x[:2])
    if rank == 0:
        repaired, _ = fxfact.refit(small, model, x.split(8))
        trained, report = fxfact.distill(repaired, model, x.split(8), steps=12)
        torch.save([report.before, trained(x).detach()], f"{folder}/found.pt")
    dist.destroy_process_group()


def test_one_process_of_several_may_repair_and_train_alone(data: Tensor, tmp_path: Path) -> None:
    mp.spawn(_one_alone, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    model = Small().eval()
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=data[:2])
    repaired, _ = fxfact.refit(small, model, data.split(8))
    trained, report = fxfact.distill(repaired, model, data.split(8), steps=12)
    before, output = torch.load(tmp_path / "found.pt")
    assert before == pytest.approx(report.before, rel=1e-4)
    torch.testing.assert_close(output, trained(data), rtol=1e-3, atol=1e-4)


def test_modules_that_are_no_plain_convolutions_are_not_compared_with_chains(data: Tensor) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4, 3, 3) / 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight).relu()

    torch.manual_seed(0)
    model = nn.Sequential(Own(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(216, 3)).eval()
    small = fxfact.factorize(model, "tucker", rank=0.5, example_inputs=data)
    assert len(fxfact.plan_of(small).rewrites) == 2
    _, report = fxfact.refit(small, model, data.split(8))
    assert set(report.paths) <= {"1"}
    fxfact.distill(small, model, data.split(8), steps=3)


def test_a_convolution_that_no_sample_reaches_stays_as_it_is(data: Tensor) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 16, 3, padding=1)
            self.rare = nn.Conv2d(16, 16, 3, padding=1)
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            chosen = x.mean((1, 2, 3)) > 50
            routed = x.clone()
            routed[chosen] = self.rare(x[chosen])
            return self.head(routed.mean((2, 3)))

    torch.manual_seed(0)
    model = Routed().eval()
    small = fxfact.factorize(model, rank=0.5, example_inputs=data[:2])
    assert {d.path for d in fxfact.plan_of(small).rewrites} == {"first", "rare"}
    repaired, report = fxfact.refit(small, model, data.split(8))
    assert report.paths == ("first",)
    assert all(bool(parameter.isfinite().all()) for parameter in repaired.parameters())


class Noisy(nn.Module):
    """Draws random numbers in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.body(x)
        return self.head((maps + torch.randn(maps.shape)).mean((2, 3)))


def test_what_is_random_is_drawn_alike_in_both_networks(data: Tensor) -> None:
    model, batches = Noisy().eval(), data.split(8)
    random_state = torch.get_rng_state()
    every = fxfact.factorize(model, "tucker", budget=fxfact.Loss(10.0), calibration=batches)
    small = fxfact.factorize(model, "tucker", rank=0.5)
    one, other = (fxfact.refit(small, model, batches)[1] for _ in range(2))
    assert (one.before, one.after, one.paths) == (other.before, other.after, other.paths)
    assert torch.get_rng_state().equal(random_state)
    assert fxfact.plan_of(every).rewrites
    same = fxfact.factorize(model, "tucker", rank=0.5, exclude="*")
    assert fxfact.refit(same, model, batches)[1].before == 0


def test_what_was_repaired_is_pickled_with_its_plan(small: Small, factorized: nn.Module, data: Tensor) -> None:
    repaired, _ = fxfact.refit(factorized, small, data.split(8))
    assert fxfact.plan_of(pickle.loads(pickle.dumps(repaired))) == fxfact.plan_of(factorized)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(4, 16, 3)

    def forward(self, x: Tensor) -> Any:
        maps = self.body(x)
        return maps.mean((2, 3)), maps.flatten(0, 1)


class Masked(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3)).masked_fill(torch.arange(16) < 2, -torch.inf)


@pytest.mark.parametrize(
    ("model", "likelihood", "words"),
    [(Two(), "gaussian", r"\[8, 128\] samples on their first axis"), (Masked(), None, "own output is NaN or Inf")],
)
def test_outputs_that_cannot_be_compared_are_refused(
    model: nn.Module, likelihood: Any, words: str, data: Tensor
) -> None:
    small = fxfact.factorize(model.eval(), "tucker", rank=0.5)
    for nearer in (fxfact.refit, fxfact.distill):
        with pytest.raises(CalibrationError, match=words):
            nearer(small, model, data.split(8), likelihood=likelihood)


def test_bad_requests(small: Small, factorized: nn.Module, data: Tensor) -> None:
    with pytest.raises(ArgumentError, match="nothing to do"):
        fxfact.refit(factorized, small, data.split(8), last_stages=False, means=False)
    with pytest.raises(CalibrationError, match="two at least"):
        fxfact.refit(factorized, small, [data])
    with pytest.raises(CalibrationError, match="fails on a batch"):
        fxfact.refit(factorized, small, data[:, :3].split(8))
    other = Small()
    other.first = nn.Conv2d(4, 8, 5, padding=2)
    with pytest.raises(PlanError, match="first: the plan is of"):
        fxfact.refit(factorized, other.eval(), data.split(8))
    with pytest.raises(ArgumentTypeError, match="original must be"):
        fxfact.refit(factorized, None, data.split(8))  # type: ignore[arg-type]
    frozen = copy.deepcopy(factorized).requires_grad_(False)
    with pytest.raises(ArgumentError, match="has none"):
        fxfact.distill(frozen, small, data.split(8))
    for argument, number in (("steps", 0), ("patience", True), ("seed", "a")):
        with pytest.raises(ArgumentError, match=f"{argument} must be an int"):
            fxfact.distill(factorized, small, data.split(8), **{argument: number})  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="seconds must be a positive number, got 0"):
        fxfact.distill(factorized, small, data.split(8), seconds=0)
    with pytest.raises(ArgumentError, match="seed must be an int, within 0 and 8388607, got -1"):
        fxfact.refit(factorized, small, data.split(8), seed=-1)


def test_networks_for_inference_are_repaired_and_recovered_as_they_are(
    small: Small, factorized: nn.Module, data: Tensor
) -> None:
    with torch.no_grad():
        small.norm.running_var.uniform_(0.05, 0.1)
    own = fxfact.factorize(small, "tucker", rank=0.4, example_inputs=data[:2])
    folded = fxfact.for_inference(own, data[:2])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    one, other = (fxfact.refit(each, small, data.split(8)) for each in (own, folded))
    assert one[1].paths == other[1].paths == ("first", "second")
    torch.testing.assert_close(one[0](data), other[0](data), rtol=1e-3, atol=1e-4)
    learned = [fxfact.distill(each, small, data.split(8), steps=40, lr=1e-3)[1] for each in (own, folded)]
    assert learned[1].after < 0.5 * learned[1].before
    assert learned[1].after == pytest.approx(learned[0].after, rel=0.5)


class Three(nn.Module):
    """Takes maps, numbers, and a number of a row of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table, self.head = nn.Conv2d(4, 16, 3), nn.Embedding(5, 16), nn.Linear(18, 3)

    def forward(self, maps: Tensor, numbers: Tensor, row: Tensor) -> Tensor:
        return self.head(torch.cat([self.conv(maps).relu().mean((2, 3)) + self.table(row), numbers], 1))


@pytest.mark.parametrize("mixup", [True, False])
def test_mixup_draws_everything_of_a_sample_towards_the_same_other(mixup: bool, data: Tensor) -> None:
    torch.manual_seed(0)
    model, numbers = Three().eval(), data[:, 0, 0, :2]
    batches = [(part, part[:, 0, 0, :2], torch.arange(8) % 5) for part in data.split(8)]
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=batches[0])
    seen: list[tuple[Tensor, ...]] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args))
    _, report = fxfact.distill(small, model, batches, steps=40, lr=1e-3, mixup=mixup)
    assert report.after < report.before
    kept = [args for args in seen if any(args[0].equal(part) for part in data.split(8))]
    mixed = [args for args in seen if not any(args[0].equal(part) for part in data.split(8))]
    assert len(mixed) == (41 if mixup else 0)  # every step, and one of the batches held out
    assert len(kept) == (1 if mixup else 41)
    for maps, drawn, rows in mixed:
        torch.testing.assert_close(maps[:, 0, 0, :2], drawn)
        assert rows.equal(batches[0][2])
        assert drawn.min() >= numbers.min()
        assert drawn.max() <= numbers.max()


@pytest.mark.parametrize("do", [fxfact.refit, fxfact.distill])
def test_the_original_is_the_network_that_the_last_plan_was_made_of(do: Any, small: Small, data: Tensor) -> None:
    brief = {"steps": 20} if do is fxfact.distill else {}
    once = fxfact.factorize(small, "tucker", rank=0.5, example_inputs=data[:2])
    twice = fxfact.factorize(once, "channel_svd", rank=0.5, example_inputs=data[:2], allow_growth=True)
    with pytest.raises(PlanError, match="the network that it was made of"):
        do(twice, small, data.split(8), **brief)
    _, report = do(twice, once, data.split(8), **brief)
    assert report.after <= report.before
    plain = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.LazyLinear(4)).eval()
    plain(data)
    merged = fxfact.for_inference(fxfact.factorize(plain, "tucker", rank=0.3, example_inputs=data), data)
    with pytest.raises(PlanError, match="stages, and they are not there any more"):
        do(merged, plain, data.split(8), **brief)


@pytest.mark.parametrize("capture", ["trace", "modules"])
def test_what_was_repaired_or_trained_is_still_verified(capture: Any, small: Small, data: Tensor) -> None:
    data = data + 1  # so that means are off
    made = fxfact.factorize(small, "tucker", rank=0.4, example_inputs=data[:2], capture=capture)
    assert fxfact.verify(small, made, data).changed == ()
    for do in (fxfact.refit, partial(fxfact.distill, steps=20, lr=1e-3)):
        changed, _ = do(made, small, data.split(8))
        verified = fxfact.verify(small, changed, data)
        assert verified.ok
        assert "first.bias" in verified.changed
        assert "changed since" in str(verified)
    changed.get_submodule("second.1").padding = (0, 0)
    assert not fxfact.verify(small, changed, data).ok


def moments_of(x: Tensor, y: Tensor) -> LeastSquaresStats:
    return LeastSquaresStats.of(x[None].double(), y[None].double())


def halves_of(x: Tensor, y: Tensor) -> list[LeastSquaresStats]:
    return [moments_of(*part) for part in zip(x.chunk(2), y.chunk(2), strict=True)]


def test_what_rows_leave_over_is_read_from_their_moments() -> None:
    torch.manual_seed(0)
    x, matrix, bias = torch.randn(50, 6).double() + 1, torch.randn(1, 4, 6).double(), torch.randn(1, 4).double()
    y = torch.randn(50, 4).double() * torch.tensor([1.0, 2.0, 3.0, 4.0])
    left = (y - x @ matrix[0].T - bias).square().sum(dim=0)
    variance = (y - y.mean(dim=0)).square().sum(dim=0)
    expected = (left / (variance + 0.01 * variance.mean())).sum()
    one, other = halves_of(x, y)
    assert (one + other).missed(matrix, bias) == pytest.approx(float(expected))


def test_many_rows_are_trusted_and_few_are_not() -> None:
    torch.manual_seed(0)
    true, old = torch.randn(4, 20), torch.randn(1, 4, 20).double()
    bias = torch.zeros(1, 4).double()

    def rows(count: int, noise: float) -> list[LeastSquaresStats]:
        x = torch.randn(count, 20)
        return halves_of(x, x @ true.T + 3 + noise * torch.randn(count, 4))

    matrix, offset = solve_last_stage(old, bias, rows(4000, 0.1), last_stages=True, means=True)
    torch.testing.assert_close(matrix[0].float(), true, atol=0.02, rtol=0)
    torch.testing.assert_close(offset[0].float(), torch.full((4,), 3.0), atol=0.02, rtol=0)
    x = torch.randn(24, 20)
    y = x @ old[0].float().T + 5 * torch.randn(24, 4)  # nothing to be learned
    few, _ = solve_last_stage(old, bias, halves_of(x, y - y.mean(dim=0)), last_stages=True, means=True)
    plain = torch.linalg.lstsq(x, y).solution.T
    assert float((few - old).norm()) < 0.2 * float((plain - old[0]).norm())
    same, _ = solve_last_stage(old, bias, rows(4000, 0.1), last_stages=False, means=True)
    assert torch.equal(same, old)
    _, same = solve_last_stage(old, bias, rows(4000, 0.1), last_stages=True, means=False)
    assert torch.equal(same, bias)


def test_with_one_part_alone_least_squares_are_damped_by_a_thousandth() -> None:
    torch.manual_seed(0)
    x, true, old = torch.randn(400, 5), torch.randn(3, 5), torch.zeros(1, 3, 5).double()
    matrix, _ = solve_last_stage(
        old, torch.zeros(1, 3).double(), [moments_of(x, x @ true.T)], last_stages=True, means=True
    )
    torch.testing.assert_close(matrix[0].float(), true, rtol=0.01, atol=0.01)


def test_chance_alone_does_not_undo_a_repair(small: Small, data: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out samples that say now this, now that; those that agree that it is worse; and NaN."""
    made = fxfact.factorize(small, "tucker", rank=0.4, example_inputs=data[:2])
    chance = torch.tensor([1.0, -0.8, 1.0, -0.8, 1.0, -0.8, 1.0, -0.8])
    for change, stays in ((chance, True), (chance.abs(), False), (torch.full((8,), torch.nan), False)):
        ends = iter([torch.ones(8), 1 + change])
        monkeypatch.setattr(TeacherStudent, "divergences", lambda self, ends=ends: next(ends))
        repaired, report = fxfact.refit(made, small, data.split(8))
        assert bool(report.paths) == stays
        assert report.after == pytest.approx(1.1 if stays else 1.0)
        assert torch.equal(repaired(data), made(data)) != stays
