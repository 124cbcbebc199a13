"""inspect after a network was changed: today's errors and MACs, or a mark that they are not today's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.errors import CaptureError, PlanError
from tests.support import Branching, FakeTimer, Small

KINDS = [Small, Branching]


def errors_of(network: Any, **options: Any) -> dict[str, float | None]:
    """Of the convolutions; the linear layer stays dense."""
    return {row.path: row.relative_error for row in fxfact.inspect(network, **options).rows if row.path != "head"}


def true_errors(original: Any, network: Any, inputs: Any = None) -> dict[str, float]:
    return {site.path: site.weight for site in fxfact.verify(original, network, inputs).sites}


def made(kind: type[Small], inputs: Tensor, factorization: Any = "tucker") -> tuple[Small, Any]:
    torch.manual_seed(0)
    model = kind().eval()
    return model, fxfact.factorize(model, factorization, rank=0.5, example_inputs=inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("improve", [fxfact.refit, lambda *args: fxfact.distill(*args, steps=3, lr=0.05)])
def test_refit_and_distill_record_the_errors_that_kernels_have_then(
    kind: type[Small], improve: Callable[..., Any], image: Tensor, data: Tensor, tmp_path: Path
) -> None:
    model, small = made(kind, image)
    before = errors_of(small)
    better, _ = improve(small, model, data.split(8))
    assert errors_of(better) == pytest.approx(true_errors(model, better, image))
    assert errors_of(better) != pytest.approx(before)
    assert errors_of(small) == before, "the network that was passed in keeps its own"
    fxfact.save(better, tmp_path / "better.pt")
    assert errors_of(fxfact.load(tmp_path / "better.pt", model)) == errors_of(better)
    assert "changed since" not in str(fxfact.inspect(better))


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "in place": lambda conv: conv.weight.data.mul_(1.25),
    "a new parameter": lambda conv: setattr(conv, "weight", nn.Parameter(conv.weight.detach() + 0.01)),
    "one number": lambda conv: conv.weight.data.view(-1)[3:4].add_(1e-3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_changed_since_are_marked_and_computed_from_the_original(
    kind: type[Small], change: Callable[[nn.Module], Any], image: Tensor
) -> None:
    model, small = made(kind, image)
    before = errors_of(small)
    change(next(module for name, module in small.named_modules() if name.startswith("second.")))
    first, second, _ = fxfact.inspect(small).rows
    assert first.relative_error == before["first"]
    assert (second.relative_error, second.recorded_error) == (None, before["second"])
    text = str(fxfact.inspect(small))
    assert f"{before['second']:.3g} (changed since)" in text
    assert "changed since: the weights have changed since this error was computed" in text
    assert errors_of(small, original=model) == pytest.approx(true_errors(model, small, image))
    assert "changed since" not in str(fxfact.inspect(small, original=model))


def test_a_training_step_is_noticed(image: Tensor) -> None:
    model, small = made(Small, image)
    optimizer = torch.optim.SGD(small.train().parameters(), 1e-2)
    small(image).square().mean().backward()
    optimizer.step()
    assert set(errors_of(small).values()) == {None}
    assert errors_of(small, original=model) == pytest.approx(true_errors(model, small, image))


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_no_weight_is_not_a_change(kind: type[Small], image: Tensor, tmp_path: Path) -> None:
    _, small = made(kind, image, ["tt", "channel_svd"])
    before = errors_of(small)
    assert None not in before.values()
    small.head.weight.data.mul_(2)
    fxfact.save(small, tmp_path / "small.pt")
    for other in (
        copy.deepcopy(small),
        small.to(memory_format=torch.channels_last),
        fxfact.load(tmp_path / "small.pt", kind()),
    ):
        assert errors_of(other) == before


def test_programs_keep_errors_in_their_files_and_are_compared_with_programs(
    small: Small, image: Tensor, tmp_path: Path
) -> None:
    program = torch.export.export(small, (image,))
    result = fxfact.factorize(program, "tucker", rank=0.5)
    fxfact.save(result, tmp_path / "small.pt2")
    again = fxfact.load(tmp_path / "small.pt2")
    assert errors_of(again) == errors_of(result) == pytest.approx(true_errors(program, again))
    for name, value in again.state_dict.items():
        if name.startswith("second.0"):
            value.data.mul_(2)
    assert errors_of(again)["second"] is None
    assert errors_of(again, original=program) == pytest.approx(true_errors(program, again))


def test_folded_weights_and_merged_stages(image: Tensor) -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3)), nn.Conv2d(8, 8, 1)).eval()
    small = fxfact.factorize(model, "tucker", rank=0.5, example_inputs=image, fold_weights=True)
    assert errors_of(small, original=model)["0"] == pytest.approx(true_errors(model, small, image)["0"])
    merged = fxfact.for_inference(small, image, timer=FakeTimer())
    row = fxfact.inspect(merged).rows[0]
    assert row.recorded_error == pytest.approx(errors_of(small)["0"])


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d])
def test_other_dimensions(kind: Any) -> None:
    model = nn.Sequential(kind(4, 8, 3, groups=2)).eval()
    small = fxfact.factorize(model, "channel_svd", rank=1, allow_growth=True)
    small.get_submodule("0.1").weight.data.add_(0.1)
    inputs = torch.randn(2, 4, *[7] * (model[0].weight.ndim - 2))
    assert errors_of(small) == {"0": None}
    assert errors_of(small, original=model) == pytest.approx(true_errors(model, small, inputs))


def test_original_must_be_the_one_that_was_factorized(small: Small, image: Tensor) -> None:
    result = fxfact.factorize(small, rank=0.5)
    with pytest.raises(PlanError, match="first: the factorized network has a convolution here"):
        fxfact.inspect(result, original=nn.Sequential(nn.Conv2d(4, 8, 3)))
    other = Small()
    other.first = nn.Conv2d(4, 9, 3)
    with pytest.raises(
        PlanError, match=r"first: the factorized network has a kernel \(8, 4, 3, 3\) here, the original"
    ):
        fxfact.inspect(result, original=other)
    with pytest.raises(PlanError, match="not made by a plan"):
        fxfact.inspect(small, original=small)


@pytest.mark.parametrize("kind", KINDS)
def test_macs_are_those_of_the_inputs_given_now_or_of_the_plan(kind: type[Small], image: Tensor) -> None:
    model, small = made(kind, image)
    larger = torch.randn(3, 4, 20, 20)
    better, _ = fxfact.refit(small, model, torch.randn(8, 4, 10, 10).split(4))
    for network in (small, better):
        for inputs, planned in ((None, image), (image, image), (larger, larger)):
            expected = [d.after.macs for d in fxfact.plan(model, "tucker", rank=0.5, example_inputs=planned)]
            assert [row.cost.macs for row in fxfact.inspect(network, example_inputs=inputs).rows] == expected


def test_macs_of_a_program_are_those_of_the_inputs_given_now(small: Small, image: Tensor) -> None:
    size, batch = torch.export.Dim("size", min=8, max=64), torch.export.Dim("batch", min=1)
    program = torch.export.export(small, (image,), dynamic_shapes=({0: batch, 2: size, 3: size},))
    result = fxfact.factorize(program, "tucker", rank=0.5)
    larger = torch.randn(3, 4, 20, 20)
    for inputs, planned in ((None, image), (larger, larger), ([larger], larger)):
        plan = fxfact.plan(small, "tucker", rank=0.5, example_inputs=planned)
        expected = [decision.after.macs for decision in plan]
        assert [row.cost.macs for row in fxfact.inspect(result, example_inputs=inputs).rows] == expected
        assert fxfact.plan(program, "tucker", rank=0.5, example_inputs=inputs).network == plan.network
    report = fxfact.report(program, result, larger)
    assert [conv.after.macs for conv in report.convolutions] == expected
    assert report.before.macs == plan.network.macs
    assert fxfact.factorize(program, "tucker", rank=0.5, example_inputs=larger, verify=True).module()(image).shape == (
        len(image),
        5,
    )


def test_inputs_that_a_program_does_not_take_are_refused(small: Small, image: Tensor) -> None:
    program = torch.export.export(small, (image,))
    for inputs, words in (
        ((image, image), "hold 2 values, and the ExportedProgram takes 1"),
        ({"x": image}, "Pass inputs as it was exported with, or none"),
        (image[:, :2], "the network cannot run on example_inputs"),
    ):
        with pytest.raises(CaptureError, match=words):
            fxfact.inspect(program, example_inputs=inputs)
