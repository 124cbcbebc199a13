"""Calibration: moments against autograd's own, budgets that are met, and what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxfact
from fxfact.calibration import Window
from fxfact.conv import ConvSpec, Skip, as_matrix
from fxfact.errors import ArgumentError, ArgumentTypeError, BudgetError, CalibrationError, PlanError
from fxfact.factorizations import Factorization
from fxfact.factorizations.cp import CPMobilenet
from fxfact.factorizations.linalg import truncated_svd
from fxfact.factorizations.stages import pointwise
from fxfact.planning.knapsack import Class, Knapsack
from fxfact.search import search
from tests.support import ALL, ENTRIES, by_name, with_entries


class Classifier(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 16, 3, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.head(F.relu(self.up(F.relu(self.grouped(x)))).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(24, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def summed(output: Tensor) -> Tensor:
    return output.square().sum()


@pytest.mark.parametrize("path", ["first", "grouped", "up"])
def test_moments_are_those_of_inputs_and_gradients(model: nn.Module, x: Tensor, path: str) -> None:
    x = x[:, :, :7, :7]  # with fewer positions than are sampled, so that the moments are exact
    found = fxfact.calibrate(model, x.split(5), likelihood=summed)
    layer, seen = model.get_submodule(path), {}
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output) or output.retain_grad())
    summed(model(x)).backward()
    inputs, gradients = seen["x"].detach(), seen["y"].grad
    window = Window(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    groups, metric = layer.groups, found.moments[path]

    def rows(maps: Tensor, *, patched: bool) -> Tensor:
        maps = window.patches(maps).flatten(4) if patched else maps[..., None]
        n, channels, *_, positions = maps.shape
        flat = maps.reshape(n, groups, channels // groups, -1, positions).permute(1, 0, 3, 2, 4)
        return flat.reshape(groups, -1, channels // groups * positions)

    def second(rows: Tensor) -> Tensor:
        return rows.transpose(1, 2) @ rows

    transposed = isinstance(layer, nn.ConvTranspose2d)
    into, out = rows(inputs, patched=not transposed), rows(gradients, patched=transposed)
    torch.testing.assert_close(
        metric.input.factors[0], into.transpose(1, 2) @ into / into.shape[1], rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(metric.output.factors[0], second(out) / len(x), rtol=1e-4, atol=1e-6)


def test_the_kernel_gradient_is_the_product_of_what_the_moments_are_of() -> None:
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, bias=False)
    x = torch.randn(1, 4, 9, 9)
    y = layer(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    patches = Window(layer.kernel_size, layer.stride, layer.padding, layer.dilation).patches(x)
    flat = patches[0].movedim(0, 2).flatten(2).flatten(0, 1)  # positions, channels · kernel
    spec = fxfact.ConvSpec.parse(4, 6, (3, 3), stride=2, padding=1, dilation=2)
    torch.testing.assert_close(gradient[0].flatten(1) @ flat, as_matrix(spec, layer.weight.grad), rtol=1e-4, atol=1e-4)


def test_the_categorical_draw_has_the_covariance_of_the_fisher_information_at_temperature_2(model: nn.Module) -> None:
    from fxfact.calibration.outputs import CATEGORICAL  # noqa: PLC0415

    logits = torch.randn(1, 4).expand(200_000, 4)
    generator = torch.Generator().manual_seed(0)
    _, (pulled,) = CATEGORICAL.sample_gradients(logits, lambda t: torch.randn(t.shape, generator=generator))
    p = (logits[0] / 2).softmax(0)
    torch.testing.assert_close(pulled.T @ pulled / len(pulled), torch.diag(p) - p[:, None] * p, rtol=0.05, atol=2e-3)


def test_batches_do_not_matter_and_the_model_is_untouched(model: nn.Module, x: Tensor) -> None:
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


def test_statistics_survive_their_file_and_give_the_same_network(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    statistics = fxfact.calibrate(model, x.split(8))
    plan = fxfact.plan(model, budget=fxfact.Macs(0.6), calibration=statistics, example_inputs=x[:1])
    statistics.save(tmp_path / "statistics.npz")
    plan.save(tmp_path / "plan.json")
    loaded = fxfact.Statistics.load(tmp_path / "statistics.npz")
    assert loaded.curves == statistics.curves
    again = fxfact.plan(model, budget=fxfact.Macs(0.6), calibration=loaded, example_inputs=x[:1])
    assert again == plan == fxfact.Plan.load(tmp_path / "plan.json")
    one, other = (fxfact.apply(plan, model, calibration=each) for each in (statistics, loaded))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(PlanError, match="statistics"):
        fxfact.apply(plan, model)
    assert fxfact.apply(plan, model, weights="empty")
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match="broken"):
        fxfact.Statistics.load(tmp_path / "broken.npz")


@pytest.mark.parametrize(
    "budget", [fxfact.Macs(0.5), fxfact.Params(0.5), fxfact.Params(at_most=1500), fxfact.Macs(0.9)]
)
@pytest.mark.parametrize("data", [True, False])
def test_budgets_are_met(model: nn.Module, x: Tensor, budget: fxfact.planning.Budget, data: bool) -> None:
    calibration = x.split(8) if data else None
    small = fxfact.factorize(model, budget=budget, calibration=calibration, example_inputs=x[:1], verify=True)
    plan = fxfact.plan_of(small)
    assert plan.rewrites
    assert budget.amount(plan.after) <= budget.allowed(plan.network)
    assert (plan.predicted_loss_increase is not None) == data
    if isinstance(budget, fxfact.Params):
        assert sum(p.numel() for p in small.parameters()) == plan.after.params
    assert "loss +" in str(plan.pareto_front)
    increases = [point.predicted_loss_increase for point in plan.pareto_front.points]
    assert increases == sorted(increases, reverse=True)


def test_a_budget_is_met_in_inference_mode_too(model: nn.Module, x: Tensor) -> None:
    asked: dict[str, Any] = {"factorization": ["tucker", "cp"], "budget": fxfact.Macs(0.6), "calibration": x.split(8)}
    with torch.inference_mode():
        small = fxfact.factorize(model, **asked)
    assert fxfact.plan_of(small) == fxfact.plan_of(fxfact.factorize(model, **asked))
    assert not any(parameter.is_inference() for parameter in small.parameters())


def test_a_front_can_be_drawn(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = fxfact.plan(model, "channel_svd", budget=fxfact.Macs(0.7), calibration=[x], example_inputs=x[:1])
    figure = plan.pareto_front.plot()
    figure.savefig(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 5000
    (line,) = figure.axes[0].lines
    assert list(line.get_ydata()) == [max(point.predicted_loss_increase, 1e-9) for point in plan.pareto_points]


def test_ranks_are_multiples(model: nn.Module, x: Tensor) -> None:
    plan = fxfact.plan(model, budget=fxfact.Macs(0.6), calibration=[x], example_inputs=x[:1], multiple_of=4)
    for decision in plan.rewrites:
        most = decision.factorization.max_rank(decision.spec)
        assert all(rank % 4 == 0 or rank == top for rank, top in zip(decision.rank, most, strict=True))


def test_a_bound_on_the_loss_is_met_by_measurement(model: nn.Module, x: Tensor) -> None:
    plans = [
        fxfact.plan(model, budget=fxfact.Loss(n), calibration=x.split(4), example_inputs=x[:1]) for n in (1e-6, 1e-4)
    ]
    assert all(plan.measured_loss_increase <= nats for plan, nats in zip(plans, (1e-6, 1e-4), strict=True))
    assert plans[1].after.macs <= plans[0].after.macs
    assert plans[1].rewrites
    assert "held-out" in str(plans[1])


def test_a_decomposition_on_data_is_nearer_in_what_comes_out(model: nn.Module, x: Tensor) -> None:
    x = x * torch.logspace(0, -3, 3)[:, None, None]  # one channel of the input hardly matters
    plain, aware = (
        fxfact.factorize(model, "channel_svd", rank=0.4, calibration=calibration, example_inputs=x[:1])
        for calibration in (None, x.split(8))
    )
    expected = model(x)
    assert (aware(x) - expected).norm() < (plain(x) - expected).norm()


def raising(x: Tensor) -> Iterator[Tensor]:
    yield x
    raise OSError("the disk is gone")


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), x


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (lambda x: [], "no batch"),
        (lambda x: x, "iterable of batches"),
        (lambda x: [x, x * float("nan")], "batch 1 contains NaN"),
        (raising, "raised after 1 batches.*disk is gone"),
        (lambda x: ["abc"], "a batch must be a tensor"),
        (lambda x: [x, x[:, :2]], "fails on a batch"),
        (lambda x: [x, x[:0]], "batch 1 contains no samples"),
        (lambda x: None, "must be an iterable of batches, got NoneType"),
        (lambda x: fxfact.calibrate(Classifier(), [x]), "must be an iterable of batches, got Statistics"),
    ],
)
def test_bad_batches_are_refused(model: nn.Module, x: Tensor, batches: Callable[[Tensor], object], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        fxfact.calibrate(model, batches(x))


def test_outputs_that_do_not_say_their_loss_are_refused(x: Tensor) -> None:
    with pytest.raises(CalibrationError, match="does not determine its loss"):
        fxfact.calibrate(Dense(), [x])
    with pytest.raises(CalibrationError, match="cannot be 'poisson'"):
        fxfact.calibrate(Dense(), [x], likelihood="poisson")
    with pytest.raises(CalibrationError, match="the function failed on the model's output: TypeError"):
        fxfact.calibrate(Dense(), [x], likelihood=nn.CrossEntropyLoss())
    assert set(fxfact.calibrate(Dense(), [x], likelihood="gaussian").moments) == {"conv"}


def test_what_cannot_be_learned_from_is_said(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"on the meta device.*Load its weights"):
        fxfact.calibrate(copy.deepcopy(model).to("meta"), [x])
    with pytest.raises(CalibrationError, match="reach no convolution"):
        fxfact.calibrate(model, [x], likelihood=lambda output: torch.zeros((), requires_grad=True))
    own = fxfact.calibrate(model, [x], likelihood=lambda output: output.square().sum())
    with pytest.raises(CalibrationError, match=r"a likelihood of your own.*leave out held_out"):
        fxfact.plan(model, budget=fxfact.Macs(0.6), calibration=own, held_out=[x], example_inputs=x[:1])
    with pytest.raises(CalibrationError, match=r"fails on a batch of \[\(.*\)\]: .*Pass batches that the model accepts"):
        fxfact.calibrate(model, [x, x[:, :1]])


@pytest.mark.parametrize("factorization", ALL, ids=by_name)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_stages_fitted_to_data_have_the_strides_of_new_ones(factorization: Any, order: int) -> None:
    """By which PyTorch chooses the memory format, of 1×1 kernels too."""
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[order - 1]
    model = nn.Sequential(kind(6, 8, 3), kind(8, 12, 3), nn.Flatten(), nn.Linear(12 * 2**order, 3)).eval()
    x = torch.randn(8, 6, *[6] * order, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"include": "1", "allow_growth": True}
    refused = isinstance(factorization.rejects(ConvSpec.parse(8, 12, (3,) * order)), Skip)
    small = fxfact.factorize(model, factorization, rank=0.6, calibration=[x], **options)
    assert bool(fxfact.plan_of(small).rewrites) != refused
    assert all(p.stride() == torch.empty(p.shape).stride() for p in small.parameters())


@pytest.mark.parametrize("seed", [-1, 2**40, "a", True])
def test_seeds_that_are_none_are_refused(model: nn.Module, x: Tensor, seed: Any) -> None:
    with pytest.raises(ArgumentError, match="seed must be an int"):
        fxfact.calibrate(model, [x], seed=seed)


@pytest.mark.parametrize("content", [b"", b"hello", b"{}"])
def test_files_that_are_no_statistics_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CalibrationError, match="this is not an archive of statistics"):
        fxfact.Statistics.load(tmp_path / "file")


@pytest.mark.parametrize("damage", ENTRIES)
def test_damaged_statistics_are_refused(model: nn.Module, x: Tensor, tmp_path: Path, damage: tuple[int, int]) -> None:
    path = tmp_path / "statistics"
    fxfact.calibrate(model, [x]).save(path)
    path.write_bytes(with_entries(path.read_bytes(), *damage))
    with pytest.raises(CalibrationError, match=r"the statistics cannot be read"):
        fxfact.Statistics.load(path)


def test_batches_of_a_program_are_cut_to_what_it_takes(model: nn.Module, x: Tensor) -> None:
    program = torch.export.export(model, (x[:8],))
    labelled = [(part, torch.zeros(8).long()) for part in x.split(8)]
    for given in (labelled, x.split(8)):
        one, other = fxfact.calibrate(model, given), fxfact.calibrate(program, given)
        assert one.samples == other.samples == len(x)
        assert one.moments.keys() == other.moments.keys()

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return self.inner(x + y - z)

    three = torch.export.export(Three().eval(), (x[:8], x[:8]), {"z": x[:8]})
    with pytest.raises(CalibrationError, match="missing 1 required"):
        fxfact.calibrate(three, [(part, part, 0) for part in x.split(8)])
    named = [{"x": part, "y": part, "z": part, "label": 0} for part in x.split(8)]
    assert fxfact.calibrate(three, named).samples == len(x)
    three = torch.export.export(Three().eval(), (x[:8], x[:8], x[:8]))
    assert fxfact.calibrate(three, [(part, part, part, 0) for part in x.split(8)]).samples == len(x)


def test_weights_in_the_same_memory_have_statistics_of_their_own(x: Tensor) -> None:
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


def test_curves_are_of_the_numbers_that_were_planned(model: nn.Module, x: Tensor) -> None:
    statistics = fxfact.calibrate(model, x.split(8))
    asked = {"factorization": "channel_svd", "budget": fxfact.Macs(0.8), "example_inputs": x[:1]}
    before = fxfact.plan(model, calibration=statistics, **asked)
    with torch.no_grad():
        model.first.weight.copy_(model.first.weight[:1].expand_as(model.first.weight))
    again = fxfact.plan(model, calibration=statistics, **asked)
    anew = replace(statistics, curves={})
    assert again == fxfact.plan(model, calibration=anew, **asked) != before


def test_a_loader_that_begins_but_once_loses_no_batch(model: nn.Module, x: Tensor) -> None:
    class Stream(IterableDataset[Tensor]):
        def __init__(self) -> None:
            self.coming = iter(x)

        def __iter__(self) -> Iterator[Tensor]:
            return self.coming

    found = fxfact.calibrate(model, DataLoader(Stream(), batch_size=4))
    assert found.samples == len(x)
    assert fxfact.plan(model, rank=0.5, calibration=DataLoader(Stream(), batch_size=4)).rewrites


def test_samples_are_those_that_the_loss_is_of(x: Tensor) -> None:
    class Scaled(Classifier):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scale": self.head.bias[:1], "logits": super().forward(x)}

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).flatten(2).permute(2, 0, 1)  # positions, samples, classes

    assert fxfact.calibrate(Scaled().eval(), x.split(8)).samples == len(x)
    loss: Any = torch.sum
    assert fxfact.calibrate(Sequence().eval(), x.split(8), likelihood=loss).samples == len(x)


def test_a_buffer_at_the_beginning_has_statistics(x: Tensor) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.randn(12, 3, 3, 3) / 5)
            self.head = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(F.conv2d(x, self.kernel)).mean((2, 3)))

    model = Fixed().eval()
    assert fxfact.calibrate(model, x.split(8)).moments.keys() == {"kernel"}
    assert not model.kernel.requires_grad


def test_processes_that_would_plan_by_clocks_of_their_own_are_told(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "rank_and_world_size", lambda: (1, 2))
    with pytest.raises(ArgumentError, match="times of its own"):
        fxfact.plan(model, budget=fxfact.Latency(0.5), calibration=x.split(8))


def test_what_is_no_iterable_of_batches_is_refused(model: nn.Module, x: Tensor) -> None:
    for given in (TensorDataset(x), 7):
        for example in (x[:1], None):
            with pytest.raises(CalibrationError, match="must be an iterable of batches"):
                fxfact.calibrate(model, given, example_inputs=example)  # type: ignore[arg-type]


def test_statistics_are_what_carries_out_a_plan_made_with_them(model: nn.Module, x: Tensor) -> None:
    plan = fxfact.plan(model, rank=0.5, calibration=fxfact.calibrate(model, [x]))
    with pytest.raises(ArgumentTypeError, match=r"must be fxfact\.Statistics, got list"):
        fxfact.apply(plan, model, calibration=[x])  # type: ignore[arg-type]
    others = fxfact.calibrate(nn.Sequential(model).eval(), [x])
    with pytest.raises(CalibrationError, match="cover none of the convolutions"):
        fxfact.apply(plan, model, calibration=others)
    assert fxfact.apply(plan, model, calibration=others, weights="empty")
    with pytest.raises(PlanError, match="made without data"):
        fxfact.apply(fxfact.plan(model, rank=0.5), model, calibration=fxfact.calibrate(model, [x]))


def test_a_likelihood_that_nothing_is_made_of_is_refused(model: nn.Module, x: Tensor) -> None:
    statistics = fxfact.calibrate(model, [x])
    for given in (None, statistics, [x]):
        with pytest.raises(CalibrationError, match="likelihood cannot be 'gausian'"):
            fxfact.plan(model, rank=0.5, calibration=given, likelihood="gausian")
    with pytest.raises(ArgumentError, match="there are none: pass calibration"):
        fxfact.plan(model, rank=0.5, likelihood="gaussian")
    with pytest.raises(ArgumentError, match="the statistics are of 'categorical'"):
        fxfact.plan(model, rank=0.5, calibration=statistics, likelihood="gaussian")
    same = fxfact.plan(model, rank=0.5, calibration=statistics, likelihood="categorical")
    assert same == fxfact.plan(model, rank=0.5, calibration=statistics)


def test_paths_that_are_none_are_told(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="None: the statistics cannot be written"):
        fxfact.calibrate(model, [x]).save(None)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="No such file"):
        fxfact.Statistics.load(tmp_path / "nowhere.npz")


def test_labels_are_ignored(model: nn.Module, x: Tensor) -> None:
    labels = torch.zeros(len(x), dtype=torch.long)
    one = fxfact.calibrate(model, [x])
    for batch in ((x, labels), [x, labels], {"x": x, "labels": labels}):
        other = fxfact.calibrate(model, [batch])
        assert all(torch.equal(m.output.factors[0], other.moments[p].output.factors[0]) for p, m in one.moments.items())


def test_budgets_that_cannot_be(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(BudgetError, match="can go down to"):
        fxfact.plan(model, "tucker", budget=fxfact.Macs(0.001), calibration=[x], example_inputs=x[:1])
    for bad in (0, 1.5, "half", True, float("nan")):
        with pytest.raises(BudgetError, match=r"Macs\(at_most=900_000\)"):
            fxfact.Macs(bad)
    with pytest.raises(BudgetError, match=r"at_most_ms=None\).*Latency\(at_most_ms=12\)"):
        fxfact.Latency(2)
    with pytest.raises(BudgetError, match="compiled is True or False"):
        fxfact.Latency(0.5, compiled="yes")  # type: ignore[arg-type]
    assert fxfact.Macs(np.float32(0.5)).fraction == 0.5
    with pytest.raises(BudgetError):
        fxfact.Params()
    with pytest.raises(BudgetError):
        fxfact.Loss(-1)
    with pytest.raises(CalibrationError, match="at least two batches are needed, got 1"):
        fxfact.plan(model, budget=fxfact.Loss(0.1), calibration=[x], example_inputs=x[:1])
    other, statistics = Classifier(), fxfact.calibrate(model, [x])
    other.first = nn.Conv2d(3, 12, 5, padding=2)
    with pytest.raises(CalibrationError, match="the statistics are of"):
        fxfact.plan(other, budget=fxfact.Params(0.5), calibration=statistics)


def test_rules_choose_ranks(model: nn.Module) -> None:
    from fxfact.planning.rank_rules import (  # noqa: PLC0415
        VBMF,
        Energy,
        LargestThatPays,
        vbmf_rank,
    )

    ranks = [sum(sum(d.rank) for d in fxfact.plan(model, "tucker", rank=Energy(s)).rewrites) for s in (0.3, 0.6)]
    assert 0 < ranks[0] < ranks[1]
    for decision in fxfact.plan(model, "channel_svd", rank=LargestThatPays()).rewrites:
        assert not decision.after.exceeds(decision.before)
        (rank,) = decision.rank
        larger = decision.factorization.layout(decision.spec, (rank + 1,))
        assert sum(stage.params for stage in larger) >= decision.before.params
    for method in (CPMobilenet(), CPMobilenet(init="random")):
        assert fxfact.plan(model, method, rank=Energy(0.5)).rewrites
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(60, 5, generator=generator), torch.randn(5, 200, generator=generator)
    assert vbmf_rank(left @ right + 0.3 * torch.randn(60, 200, generator=generator)) == 5
    assert vbmf_rank(torch.randn(60, 200, generator=generator)) <= 1
    assert "VBMF finds ranks of matrices" in fxfact.plan(model, "cp", rank=VBMF())["first"].reason


def test_the_knapsack_is_within_a_hundredth_of_the_optimum() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    random = np.random.default_rng(0)
    for _ in range(20):
        classes = []
        for _ in range(8):
            costs = np.sort(random.uniform(1, 100, 12))
            classes.append(
                Class(costs.tolist(), (random.uniform(1, 10) * np.exp(-costs / random.uniform(10, 60))).tolist())
            )
        knapsack = Knapsack(classes)
        bound = random.uniform(knapsack.least, sum(max(c.costs) for c in classes))
        picked = knapsack.at(bound)
        assert sum(c.costs[k] for c, k in zip(classes, picked, strict=True)) <= bound
        value = sum(c.values[k] for c, k in zip(classes, picked, strict=True))
        costs, values = (np.concatenate([getattr(c, name) for c in classes]) for name in ("costs", "values"))
        one_of_each = np.kron(np.eye(8), np.ones(12))
        constraints = [optimize.LinearConstraint(one_of_each, 1, 1), optimize.LinearConstraint(costs[None], 0, bound)]
        exact = optimize.milp(values, constraints=constraints, integrality=1, bounds=optimize.Bounds(0, 1))
        assert value <= 1.01 * exact.fun
        assert knapsack.at(knapsack.least - 1) is None


def test_recovery_brings_a_network_nearer(model: nn.Module, x: Tensor) -> None:
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=x[:1])
    before = copy.deepcopy(small.state_dict())
    recovered, report = fxfact.distill(small, model, x.split(4), steps=60, lr=3e-3)
    assert report.after < report.before
    assert report.steps <= 60
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert fxfact.plan_of(recovered) == fxfact.plan_of(small)
    again, _ = fxfact.distill(small, model, x.split(4), steps=60, lr=3e-3)
    assert torch.equal(again(x), recovered(x))
    with pytest.raises(ArgumentTypeError):
        fxfact.distill(small, None, x.split(4))  # type: ignore[arg-type]


def test_training_that_goes_wrong_is_told(model: nn.Module, x: Tensor) -> None:
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=x[:1])
    with pytest.raises(ArgumentError, match="lr must be a positive number, got 'fast'"):
        fxfact.distill(small, model, x.split(4), lr="fast")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"augment fails on a tensor \(4, 3, 9, 9\)"):
        fxfact.distill(small, model, x.split(4), augment=lambda part: part.no_such_thing)
    with pytest.warns(UserWarning, match="NaN or Inf"):
        kept, report = fxfact.distill(small, model, x.split(4), steps=2, augment=lambda part: part * float("nan"))
    assert kept(x).equal(small(x))
    assert report.after == report.before


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Classifier().eval()
    x = torch.randn(24, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    statistics = fxfact.calibrate(model, x[rank::2].split(5))
    statistics.save(f"{folder}/{rank}.npz")
    plan = fxfact.plan(model, budget=fxfact.Macs(0.6), calibration=statistics, example_inputs=x[:1])
    plan.save(f"{folder}/{rank}.json")
    dist.destroy_process_group()


def test_two_processes_give_the_plan_of_one(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    mp.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    alone = fxfact.calibrate(model, x.split(8))
    plan = fxfact.plan(model, budget=fxfact.Macs(0.6), calibration=alone, example_inputs=x[:1])
    for rank in range(2):
        together = fxfact.Statistics.load(tmp_path / f"{rank}.npz")
        assert together.samples == alone.samples
        for path, metric in alone.moments.items():
            for side in ("input", "output"):
                mine, theirs = (getattr(m, side).factors[0] for m in (metric, together.moments[path]))
                assert float((mine - theirs).norm()) <= 1e-6 * float(mine.norm())
        found = fxfact.Plan.load(tmp_path / f"{rank}.json")
        assert [(d.factorization, d.rank) for d in found] == [(d.factorization, d.rank) for d in plan]


@dataclass(frozen=True, kw_only=True)
class DepthwiseFirst(Factorization):
    """Depthwise k×k, R maps of every channel → 1×1: an SVD of every input channel's kernels."""

    name = "depthwise_first"

    def _rejects(self, block: ConvSpec) -> str | None:
        return "transposed" if block.transposed else None

    def _max_rank(self, block: ConvSpec) -> tuple[int, ...]:
        return (min(math.prod(block.kernel_size), block.out_channels),)

    def _stages(self, block: ConvSpec, rank: tuple[int, ...]) -> tuple[ConvSpec, ...]:
        maps = block.in_channels * rank[0]
        return (replace(block, out_channels=maps, groups=block.in_channels), pointwise(block, maps, block.out_channels))

    def _weights(self, block: ConvSpec, weight: Tensor, rank: tuple[int, ...], random: Any) -> tuple[Tensor, ...]:
        parts = [truncated_svd(part.flatten(1), *rank) for part in weight.unbind(1)]
        return torch.cat([right for _, right in parts]), torch.cat([left for left, _ in parts], 1)


def test_a_factorization_with_groups_at_its_ends_is_planned_on_data(model: nn.Module, x: Tensor) -> None:
    asked: dict[str, Any] = {"calibration": x.split(8), "example_inputs": x[:1], "verify": True}
    given = fxfact.factorize(model, DepthwiseFirst(), rank=2, **asked)
    within = fxfact.factorize(model, DepthwiseFirst(), budget=fxfact.Macs(0.7), **asked)
    assert [d.path for d in fxfact.plan_of(given).rewrites] == ["first", "grouped"]
    assert fxfact.plan_of(within).rewrites


def test_weights_that_are_parts_of_one_storage_are_told_apart(x: Tensor) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convs = [nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))]
        model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    apart = fxfact.calibrate(model, x.split(8))
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    assert model[0].weight.untyped_storage()._cdata == model[1].weight.untyped_storage()._cdata
    together = fxfact.calibrate(model, x.split(8))
    assert list(together.moments) == ["0", "1", "2"]
    for path, metric in apart.moments.items():
        torch.testing.assert_close(metric.input.factors[0], together.moments[path].input.factors[0])
        torch.testing.assert_close(metric.output.factors[0], together.moments[path].output.factors[0])
    for how in ("trace", "modules"):
        small = fxfact.factorize(model, "tucker", rank=0.5, example_inputs=x[:2], capture=how, verify=True)
        assert len(fxfact.plan_of(small).rewrites) == 3


def test_a_part_of_a_weight_that_forward_reads_is_still_seen(x: Tensor) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x)) * self.two.weight[3:5].sum()

    model = Reading().eval()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters())
    plan = fxfact.plan(model, "tucker", rank=0.5, example_inputs=x[:2], capture="modules")
    assert [decision.path for decision in plan.rewrites] == ["one"]
    assert "its weight is also read by" in plan["two"].reason


class Mixed(Classifier):
    """In mixed precision of its own accord."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


def test_convolutions_under_autocast_are_learned_from_like_others(model: nn.Module, x: Tensor) -> None:
    mixed = Mixed().eval()
    mixed.load_state_dict(model.state_dict())
    expected, found = (fxfact.calibrate(each, x.split(8), likelihood="gaussian") for each in (model, mixed))
    assert found.moments.keys() == expected.moments.keys()
    for path, metric in expected.moments.items():
        one, other = (m.input.factors[0] for m in (metric, found.moments[path]))
        assert float((one - other).norm()) < 0.02 * float(one.norm())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fxfact.plan(model, budget=fxfact.Macs(0.6), calibration=expected, example_inputs=x[:1])
    outside = fxfact.plan(model, budget=fxfact.Macs(0.6), calibration=expected, example_inputs=x[:1])
    assert [decision.rank for decision in inside] == [decision.rank for decision in outside]


def test_gradients_that_are_no_numbers_are_told_and_calls_on_nothing_do_no_harm(x: Tensor) -> None:
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
    assert list(fxfact.calibrate(model, x.split(8)).moments) == ["conv"]
    blank = x.clone()
    blank[5] = 0  # the root of whose variance has no gradient
    with pytest.raises(CalibrationError, match=r"at conv an input or a gradient is NaN"):
        fxfact.calibrate(model, blank.split(8))


def test_the_default_device_does_not_matter(model: nn.Module, x: Tensor) -> None:
    kinds = ["tucker", "cp", "channel_svd"]
    with torch.device("meta"):  # stands for a GPU: what is made there by mistake is of no use here
        statistics = fxfact.calibrate(model, x.split(8))
        small = fxfact.factorize(model, kinds, budget=fxfact.Macs(0.6), calibration=statistics, example_inputs=x[:1])
        repaired, _ = fxfact.refit(small, model, x.split(4))
        fxfact.distill(small, model, x.split(4), steps=3, mixup=True)
        fxfact.factorize(model, kinds, budget=fxfact.Latency(1.0), example_inputs=x[:1])
    again = fxfact.factorize(model, kinds, budget=fxfact.Macs(0.6), calibration=statistics, example_inputs=x[:1])
    torch.testing.assert_close(small(x), again(x))
    torch.testing.assert_close(repaired(x), fxfact.refit(again, model, x.split(4))[0](x))


def test_without_example_inputs_a_sample_of_the_data_shows_how_the_model_runs() -> None:
    class Untraceable(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) > -1e9 else -x)

    model, x = Untraceable().eval(), torch.randn(12, 3, 9, 9)
    assert fxfact.calibrate(model, (part for part in x.split(4))).samples == 12  # of a generator none is lost
    parts = ({"x": part, "labels": 0} for part in x.split(4))
    plan = fxfact.plan(model, budget=fxfact.Macs(0.7), calibration=parts, held_out=[{"x": x, "labels": 0}])
    assert plan.capture == "modules"
    assert plan.compared
    assert plan.network.macs
    assert plan.predicted_loss_increase is not None
    assert plan.predicted_loss_increase > 0
    assert plan.measured_loss_increase is not None
