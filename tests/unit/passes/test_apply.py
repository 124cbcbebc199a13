"""Plans applied to captured networks, in the way that suits how they were captured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxfact
from fxfact.capture import capture
from fxfact.errors import ArgumentError, ArgumentTypeError, PlanError
from fxfact.passes import DecomposeOptions, apply_plan, capture_as_planned, pass_history
from tests.support import Branching, Small, apart, copied_state, has_state


@pytest.mark.parametrize("frontend", ["trace", "modules", "export"])
def test_apply_plan_returns_a_network_of_the_captured_kind(small: Small, image: Tensor, frontend: str) -> None:
    source: Any = torch.export.export(small, (image,)) if frontend == "export" else small
    captured = capture(source, None if frontend == "export" else image, how=frontend)
    before = copied_state(captured.network)
    plan = fxfact.plan(source, "channel_svd", example_inputs=None if frontend == "export" else image, capture=frontend)
    result = apply_plan(plan, captured, DecomposeOptions())
    expected = {"trace": fx.GraphModule, "modules": Small, "export": torch.export.ExportedProgram}[frontend]
    assert isinstance(result, expected)
    (record,) = pass_history(result)
    assert record.plan == plan
    assert record.relative_error.keys() == {decision.path for decision in plan.rewrites} == {"first", "second"}
    assert all(0 < (error or 0) < 1 for error in record.relative_error.values())
    network = result.module() if isinstance(result, torch.export.ExportedProgram) else result
    assert 0 < apart(small(image), network(image)) < 1
    assert has_state(captured.network, before)


def test_apply_plan_without_rewrites_returns_a_copy_with_a_record(small: Small, image: Tensor) -> None:
    for frontend in ("trace", "modules"):
        captured = capture(small, image, how=frontend)  # type: ignore[arg-type]
        plan = fxfact.plan(small, exclude="*", example_inputs=image, capture=frontend)  # type: ignore[arg-type]
        result = apply_plan(plan, captured, DecomposeOptions())
        assert isinstance(result, nn.Module)
        assert result is not captured.network
        assert [record.plan for record in pass_history(result)] == [plan]
        assert pass_history(captured.network) == ()
        assert torch.equal(result(image), small(image))


def test_apply_plan_runs_the_inference_passes_of_the_plan(small: Small, image: Tensor) -> None:
    plan = replace(fxfact.plan(small, "channel_svd", example_inputs=image), inference_passes=("fold_batch_norms",))
    result = apply_plan(plan, capture(small.train(), image), DecomposeOptions())
    assert isinstance(result, nn.Module)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.modules())
    assert not result.training
    assert fxfact.plan_of(result) == plan


def test_plan_of_a_programs_module_applies_to_the_program(small: Small, image: Tensor) -> None:
    program = torch.export.export(small, (image,))
    plan = fxfact.plan(program, "channel_svd")
    other = fxfact.apply(plan, program)
    assert isinstance(other, torch.export.ExportedProgram)
    assert fxfact.plan_of(other).capture == "export"


def test_capture_as_planned_captures_in_the_way_of_the_plan(small: Small, image: Tensor) -> None:
    for frontend in ("trace", "modules"):
        plan = fxfact.plan(small, example_inputs=image, capture=frontend)  # type: ignore[arg-type]
        assert capture_as_planned(small, plan).frontend == frontend


def test_state_dict_loads_into_the_empty_structure(small: Small, image: Tensor) -> None:
    result = fxfact.factorize(small, "cp")
    empty = fxfact.apply(fxfact.plan_of(result), Small().eval(), weights="empty")
    empty.load_state_dict(result.state_dict())
    assert empty(image).equal(result(image))
    assert set(pass_history(empty)[-1].relative_error.values()) == {None}
    meta = fxfact.apply(fxfact.plan_of(result), Small().to("meta"), weights="empty")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "meta"])
def test_bad_weight_is_refused_by_name_and_the_model_stays_unchanged(small: Small, bad: float | str) -> None:
    if isinstance(bad, str):
        small.second.to("meta")
    else:
        small.second.weight.data[3, 1, 0, 2] = bad
    before = copied_state(small)
    with pytest.raises(fxfact.FxfactError, match=r"^second: the weight"):
        fxfact.factorize(small)
    assert {name for name, _ in small.named_modules()} == {name for name, _ in Small().named_modules()}
    assert all(v.is_meta or v.nan_to_num().equal(before[k].nan_to_num()) for k, v in small.state_dict().items())
    assert fxfact.factorize(small, exclude="second").get_submodule("first.0") is not None


def test_apply_refuses_bad_arguments(small: Small) -> None:
    plan = fxfact.plan(small)
    with pytest.raises(ArgumentError, match="'decompose' or 'empty'"):
        fxfact.apply(plan, small, weights="random")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"fxfact\.Plan"):
        fxfact.apply("plan", small)  # type: ignore[arg-type]


def test_parameters_made_in_inference_mode_can_be_trained(small: Small, image: Tensor) -> None:
    plan = fxfact.plan(small, "channel_svd", example_inputs=image)
    with torch.inference_mode():
        result = fxfact.apply(plan, small)
    assert not any(parameter.is_inference() for parameter in result.parameters())
    result(image).sum().backward()


def test_plan_for_a_graph_does_not_apply_to_a_model_that_cannot_be_traced(small: Small, image: Tensor) -> None:
    plan = fxfact.plan(small, example_inputs=image, capture="trace")
    with pytest.raises(fxfact.errors.CaptureError):
        fxfact.apply(plan, Branching())
    with pytest.raises(PlanError, match="made for another model"):
        fxfact.apply(plan, nn.Sequential(nn.Conv2d(4, 8, 3)))
