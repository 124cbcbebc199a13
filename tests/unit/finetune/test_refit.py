"""Refitting: networks come closer, means are met, and worse results are undone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfact
from fxfact.errors import ArgumentError
from fxfact.finetune.refit import record_targets
from fxfact.finetune.teacher_student import TeacherStudent
from tests.support import FakeTimer, Small


def test_refit_brings_a_network_closer_and_changes_neither(small: Small, factorized: nn.Module, data: Tensor) -> None:
    before = copy.deepcopy(factorized.state_dict()), copy.deepcopy(small.state_dict())
    refitted, report = fxfact.refit(factorized, small, data.split(8))
    assert report.after < 0.9 * report.before
    assert report.paths == ("first", "second")
    for network, state in zip((factorized, small), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert refitted.state_dict().keys() == factorized.state_dict().keys()
    assert fxfact.plan_of(refitted) == fxfact.plan_of(factorized)
    again, _ = fxfact.refit(factorized, small, data.split(8))
    assert torch.equal(again(data), refitted(data))


def test_refit_gives_the_same_for_swapped_modules(small: Small, data: Tensor) -> None:
    swapped = fxfact.factorize(small, "tucker", rank=0.4, example_inputs=data[:2], capture="modules")
    traced = fxfact.factorize(small, "tucker", rank=0.4, example_inputs=data[:2], capture="trace")
    one, other = (fxfact.refit(each, small, data.split(8))[0] for each in (swapped, traced))
    assert torch.allclose(one(data), other(data), atol=1e-5)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_refit_corrects_means_in_the_batch_norm_after_a_convolution_without_bias() -> None:
    torch.manual_seed(0)
    model = Normed().eval()
    x = 1 + torch.randn(16, 4, 7, 7)  # with 25 positions, all of which are used
    small = fxfact.factorize(model, "channel_svd", rank=0.5, example_inputs=x)
    recorded: dict[str, Tensor] = {}

    def mean_of(network: nn.Module) -> Tensor:
        handle = network.get_submodule("norm").register_forward_hook(lambda m, a, output: recorded.update(y=output))
        network(torch.cat([x[:12]]))
        handle.remove()
        return recorded["y"].mean((0, 2, 3))

    refitted, report = fxfact.refit(small, model, x.split(4), last_stages=False)
    assert report.paths == ("conv",)
    assert not torch.allclose(mean_of(small), mean_of(model), atol=1e-2)
    torch.testing.assert_close(mean_of(refitted), mean_of(model), rtol=1e-4, atol=1e-5)
    assert torch.equal(refitted.get_submodule("norm").running_var, model.norm.running_var)


class Shared(Small):
    """Has convolutions that are not refitted, and that outweigh the others."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(12, 12, 3, bias=False)
        self.once_more = nn.Conv2d(12, 12, 3, bias=False)
        self.once_more.weight = self.again.weight
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.norm(self.first(x)).relu(), self.kernel)
        return self.head(self.once_more(self.again(self.second(x).relu())).mean((2, 3)))


def test_refit_skips_shared_weights_and_functions_and_undoes_a_worse_result() -> None:
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(96, 4, 18, 18)
    x[:72] += 3
    x[72:] -= 3  # the batch that is held out
    small = fxfact.factorize(model, "tucker", rank=0.6, example_inputs=x[:2])
    assert {"kernel", "again", "once_more"} <= {decision.path for decision in fxfact.plan_of(small).rewrites}
    networks = TeacherStudent(small, model, x.split(24), example_inputs=None, likelihood=None)
    assert [site.path for site in record_targets(networks, 0)] == ["first", "second"]
    refitted, report = fxfact.refit(small, model, x.split(24))
    assert (report.after, report.paths) == (report.before, ())
    assert torch.equal(refitted(x), small(x))


def test_targets_are_outputs_before_the_next_operation_writes_to_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(inplace=True), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 3)
    ).eval()
    x = torch.randn(16, 4, 6, 6)  # with 16 positions, all of which are used
    small = fxfact.factorize(model, "channel_svd", rank=0.5, example_inputs=x)
    (target,) = record_targets(TeacherStudent(small, model, x.split(4), example_inputs=None, likelihood=None), 0)
    torch.testing.assert_close(
        torch.cat([rows for calls in target.outputs for rows in calls]), rows_of(model[0], x[:12])
    )
    assert target.norm is None  # its input is the output of the activation, in the same tensor


def rows_of(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).detach().flatten(2).mT


class Sometimes(Small):
    """Calls one convolution for some batches only, and writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.0)
        if x.mean() > 0:
            x = x + self.first(x)[:, :4]
        return self.head(torch.relu(self.second(self.norm(self.first(x)))).mean((2, 3)))


def test_refit_takes_calls_that_differ_between_batches_and_an_iterator() -> None:
    torch.manual_seed(0)
    model, x = Sometimes().eval(), torch.randn(32, 4, 10, 10)
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=x[:2])
    before = x.clone()
    with torch.inference_mode():
        refitted, report = fxfact.refit(small, model, (batch for batch in x.split(4)))
    assert report.after <= report.before
    assert torch.equal(x, before)
    assert not any(parameter.is_inference() for parameter in refitted.parameters())


class NoGrad(Small):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class InferenceInside(Small):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            x = self.first(x)
        return self.head(torch.relu(self.second(self.norm(x.clone()))).mean((2, 3)))


@pytest.mark.parametrize("kind", [NoGrad, InferenceInside])
def test_refit_needs_no_gradients(kind: type[Small], data: Tensor) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    small = fxfact.factorize(model, "tucker", rank=0.4, example_inputs=data[:2])
    _, report = fxfact.refit(small, model, data.split(8))
    assert report.after < report.before


def test_modules_with_their_own_forward_are_not_compared_with_chains(data: Tensor) -> None:
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


def test_refit_skips_a_convolution_that_no_sample_reaches(data: Tensor) -> None:
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
    refitted, report = fxfact.refit(small, model, data.split(8))
    assert report.paths == ("first",)
    assert all(bool(parameter.isfinite().all()) for parameter in refitted.parameters())


class Noisy(nn.Module):
    """Draws random numbers also in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.body(x)
        return self.head((maps + torch.randn(maps.shape)).mean((2, 3)))


def test_both_networks_draw_the_same_random_numbers(data: Tensor) -> None:
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


def test_refitted_network_is_pickled_with_its_plan(small: Small, factorized: nn.Module, data: Tensor) -> None:
    refitted, _ = fxfact.refit(factorized, small, data.split(8))
    assert fxfact.plan_of(pickle.loads(pickle.dumps(refitted))) == fxfact.plan_of(factorized)


@pytest.mark.parametrize("capture", ["trace", "modules"])
def test_refitted_network_is_verified(capture: Any, small: Small, data: Tensor) -> None:
    data = data + 1  # so that means differ
    made = fxfact.factorize(small, "tucker", rank=0.4, example_inputs=data[:2], capture=capture)
    assert fxfact.verify(small, made, data).changed == ()
    changed, _ = fxfact.refit(made, small, data.split(8))
    verified = fxfact.verify(small, changed, data)
    assert verified.ok
    assert "first.bias" in verified.changed
    assert "changed after factorization" in str(verified)
    changed.get_submodule("second.1").padding = (0, 0)
    assert not fxfact.verify(small, changed, data).ok


def test_refit_of_a_network_for_inference_gives_the_same(small: Small, factorized: nn.Module, data: Tensor) -> None:
    with torch.no_grad():
        small.norm.running_var.uniform_(0.05, 0.1)
    own = fxfact.factorize(small, "tucker", rank=0.4, example_inputs=data[:2])
    folded = fxfact.for_inference(own, data[:2], timer=FakeTimer())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    one, other = (fxfact.refit(each, small, data.split(8)) for each in (own, folded))
    assert one[1].paths == other[1].paths == ("first", "second")
    torch.testing.assert_close(one[0](data), other[0](data), rtol=1e-3, atol=1e-4)


def test_refit_result_prints_what_was_done() -> None:
    result = fxfact.RefitResult(before=0.25, after=0.125, seconds=1.23, paths=("first", "second"))
    assert (
        str(result) == "2 chains refitted in 1.2 s: 0.25 → 0.125 nats per sample from the original, on held-out batches"
    )


def test_refit_shows_its_progress(small: Small, factorized: nn.Module, data: Tensor) -> None:
    shown: list[tuple[int, str]] = []

    def progress(results: Any, *, total: int, desc: str) -> Any:
        shown.append((total, desc))
        return results

    fxfact.refit(factorized, small, data.split(8), progress=progress)
    assert shown == [(2, "refitting")]


def test_refit_looks_at_other_positions_for_another_seed(small: Small, factorized: nn.Module, data: Tensor) -> None:
    one, same, other = (fxfact.refit(factorized, small, data.split(8), seed=seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_refit_without_work_or_with_a_bad_seed_is_refused(small: Small, factorized: nn.Module, data: Tensor) -> None:
    with pytest.raises(ArgumentError, match="nothing to do"):
        fxfact.refit(factorized, small, data.split(8), last_stages=False, means=False)
    with pytest.raises(ArgumentError, match="seed must be an int, between 0 and 8388607, got -1"):
        fxfact.refit(factorized, small, data.split(8), seed=-1)


def test_refit_is_undone_only_if_it_is_significantly_worse(
    small: Small, data: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out samples that disagree, samples that agree that the network is worse, and NaN."""
    made = fxfact.factorize(small, "tucker", rank=0.4, example_inputs=data[:2])
    chance = torch.tensor([1.0, -0.8, 1.0, -0.8, 1.0, -0.8, 1.0, -0.8])
    for change, stays in ((chance, True), (chance.abs(), False), (torch.full((8,), torch.nan), False)):
        ends = iter([torch.ones(8), 1 + change])
        monkeypatch.setattr(TeacherStudent, "divergences", lambda self, ends=ends: next(ends))
        refitted, report = fxfact.refit(made, small, data.split(8))
        assert bool(report.paths) == stays
        assert report.after == pytest.approx(1.1 if stays else 1.0)
        assert torch.equal(refitted(data), made(data)) != stays


class Tokens(nn.Module):
    """Linear layers on tokens, and a norm whose channels are the positions of one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 24), nn.Linear(24, 12, bias=False)
        self.norm, self.head = nn.BatchNorm1d(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.second(torch.tanh(self.first(x))))).mean(1))


@pytest.mark.parametrize("capture", ["trace", "modules"])
def test_linear_layers_are_refitted_and_means_go_only_into_norms_over_their_channels(capture: Any) -> None:
    model, data = Tokens().eval(), torch.randn(64, 12, 4, generator=torch.Generator().manual_seed(0)) + 1
    small = fxfact.factorize(model, "svd", rank={"first": 2, "second": 4}, example_inputs=data[:1], capture=capture)
    refitted, result = fxfact.refit(small, model, data.split(8), likelihood="gaussian")
    assert set(result.paths) == {"first", "second"}
    assert result.after < 0.9 * result.before
    assert torch.equal(refitted.norm.running_mean, model.norm.running_mean), "its channels are the tokens"
    assert fxfact.verify(model, refitted, data).ok
    trained, distilled = fxfact.distill(small, model, data.split(8), likelihood="gaussian", steps=40, lr=1e-2)
    assert distilled.after < distilled.before
    assert fxfact.verify(model, trained, data).ok


def test_means_go_into_the_norm_after_a_linear_layer_on_vectors() -> None:
    model, data = Tokens().eval(), torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + 1
    network = nn.Sequential(model.first, nn.Tanh(), model.second, model.norm, nn.Tanh(), model.head).eval()
    small = fxfact.factorize(network, "svd", rank={"2": 2}, example_inputs=data[:1])
    refitted, result = fxfact.refit(small, network, data.split(8), likelihood="gaussian")
    assert result.paths == ("2",)
    assert not torch.equal(refitted.get_submodule("3").running_mean, network[3].running_mean)
