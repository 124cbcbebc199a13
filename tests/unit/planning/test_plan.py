"""Plans: what they say, how they print, how they are edited, saved and loaded, and which models they fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

import fxfact
from fxfact.conv import Cost
from fxfact.errors import ArgumentTypeError, PlanError, RankError
from fxfact.factorizations import Tucker
from fxfact.factorizations.cp import CPMobilenet
from fxfact.planning import MeasuredPoint, ParetoPoint
from tests.support import ALL, Small, by_name, params_of, quick


@pytest.mark.parametrize("factorization", [*map(quick, ALL)], ids=by_name)
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
def test_plan_says_what_the_network_will_have(
    small: Small, image: Tensor, factorization: object, fraction: float
) -> None:
    plan = fxfact.plan(small, factorization, rank=fraction, example_inputs=image)  # type: ignore[arg-type]
    result = fxfact.apply(plan, small)
    for decision in plan:
        module = result.get_submodule(decision.path)
        assert params_of([module]) == decision.after.params
        if decision.factorization:
            assert decision.after.params <= fraction * decision.before.params
        else:
            assert decision.reason
    assert plan.network.params == params_of([small])
    assert plan.after.params == params_of([result])
    again = fxfact.plan(result, exclude="*", example_inputs=image)
    assert plan.after.macs == again.network.macs


def test_plan_prints_as_a_table(small: Small, image: Tensor) -> None:
    text = fxfact.plan(small, rank={"second": (5, 4)}, example_inputs=image).table()
    assert "second" in text
    assert "tucker" in text
    assert "(5,4)" in text
    assert "no rank is given for it" in text
    assert "864 → 272 (0.31)" in text
    assert "21,600 → 9,200 (0.43)" in text
    assert "1 of 3 rewritten" in text


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120])
def test_plan_fits_the_width_and_says_why_layers_stay_dense(small: Small, image: Tensor, width: int) -> None:
    plan = fxfact.plan(small, rank={"second": (5, 4)}, example_inputs=image)
    text = plan.table(width)
    assert max(map(len, text.splitlines())) <= width
    assert all(decision.path in text for decision in plan)
    words = " ".join(text.split())
    assert "no rank is given for it" in words
    assert ("stay dense: 2× no rank is given for it" in words) == ("remark" not in text.splitlines()[0])


def test_plan_is_printed_in_the_width_of_the_terminal(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = fxfact.plan(small)
    monkeypatch.setenv("COLUMNS", "44")
    assert str(plan) == plan.table(44)
    assert len(plan.table().splitlines()[0]) > 44


def test_plan_without_example_inputs_has_no_macs(small: Small) -> None:
    plan = fxfact.plan(small)
    assert plan.network.macs is None
    assert plan.after.macs is None
    assert plan["second"].after.macs is None
    assert plan["second"].input_sizes is None


# The model that a plan fits


def test_plan_that_rewrites_nothing_fits_only_its_model(small: Small) -> None:
    nothing = fxfact.plan(nn.Sequential(nn.ReLU()))
    with pytest.raises(PlanError, match="made for another model"):
        fxfact.apply(nothing, small)
    kept = fxfact.apply(fxfact.plan(small, exclude="*"), small)
    assert len(fxfact.plan_of(kept)) == 3


def test_plan_for_another_model_is_refused_with_the_differences(small: Small) -> None:
    plan = fxfact.plan(small)
    other = Small()
    other.second = nn.Conv2d(8, 16, 3, padding=1)
    other.head = nn.Linear(16, 5)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(PlanError, match=r"second: the plan has Conv2d\(8→12, .*the model Conv2d\(8→16"):
        fxfact.apply(plan, other)
    assert all(value.equal(before[name]) for name, value in other.state_dict().items())
    with pytest.raises(PlanError, match=r"first: the plan has Conv2d.* the model nothing"):
        fxfact.apply(plan, nn.ReLU())
    with pytest.raises(PlanError, match=r"0: the plan has .* with bias, the model .* without bias"):
        fxfact.apply(fxfact.plan(nn.Sequential(nn.Conv2d(4, 4, 3))), nn.Sequential(nn.Conv2d(4, 4, 3, bias=False)))
    many = fxfact.plan(nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(6))))
    with pytest.raises(PlanError, match="and 6 more"):
        fxfact.apply(many, small)


# Edits


def test_plan_can_be_edited(small: Small, image: Tensor) -> None:
    plan = fxfact.plan(small, example_inputs=image)
    edited = plan.edited("second", rank=(3, 2)).edited("first", skip="the first one stays")
    assert edited["second"].rank == (3, 2)
    assert edited["first"].reason == "the first one stays"
    assert replace(plan, measured_loss_increase=1.0, measured_ms=(2.0, 1.0)).edited(
        "second", rank=(3, 2)
    ) == plan.edited("second", rank=(3, 2))
    assert plan["second"].rank != (3, 2)
    result = fxfact.apply(edited, small)
    assert isinstance(result.first, nn.Conv2d)
    assert result.get_submodule("second.1").in_channels == 2
    assert edited.edited("first", factorization="cp", rank=4)["first"].factorization == CPMobilenet()


def test_edit_that_does_not_suit_the_convolution_is_refused(small: Small, image: Tensor) -> None:
    plan = fxfact.plan(small, example_inputs=image)
    for change, error in (
        ({"rank": (99, 2)}, RankError),
        ({"factorization": "svd", "rank": 2}, PlanError),
        ({"skip": 3}, ArgumentTypeError),
    ):
        with pytest.raises(error):
            plan.edited("second", **change)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="no layer at 'third'"):
        plan.edited("third", rank=2)
    with pytest.raises(PlanError, match="nothing to edit"):
        fxfact.plan(small, exclude="*").edited("second", rank=2)


# Files


def test_plan_survives_its_file(small: Small, image: Tensor, tmp_path: Path) -> None:
    method = {"first": CPMobilenet(sweeps=7), "second": [Tucker(keep_full_sides=True)]}
    plan = fxfact.plan(small, method, example_inputs=image)
    plan.save(tmp_path / "plan.json")
    loaded = fxfact.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert str(loaded) == str(plan)
    assert fxfact.apply(loaded, small)(image).equal(fxfact.apply(plan, small)(image))
    assert json.loads((tmp_path / "plan.json").read_text())["decisions"][0]["factorization"]["options"]["sweeps"] == 7


def test_file_of_a_plan_has_two_lines_for_each_convolution(small: Small, image: Tensor, tmp_path: Path) -> None:
    batches = [image, -image]
    plan = fxfact.plan(small, "tucker", budget=fxfact.Macs(0.8), calibration=batches, exclude="first")
    plan = replace(plan, measured_loss_increase=None)  # which an edited plan does not have
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text(encoding="utf-8")
    data = json.loads(text)
    assert data == json.loads(json.dumps(plan.to_json()))
    assert data["call"]["budget"] == {"Macs": {"fraction": 0.8}}
    lines = text.splitlines()
    (start,) = (k for k, line in enumerate(lines) if line == ' "decisions": [')
    assert [line.split(", ")[0] for line in lines[start + 1 : start + 5 : 2]] == [
        '  {"path": "first"',
        '  {"path": "second"',
    ]
    assert len(lines) == 2 * len(plan) + len(plan.pareto_points) + len(plan.outputs) + len(data) + 5
    assert max(map(len, lines)) < 350
    edited = plan.edited("second", skip="die Schicht bleibt, größer → nein")
    edited.save(tmp_path / "edited.json")
    others = (tmp_path / "edited.json").read_text(encoding="utf-8").splitlines()
    assert [k for k, pair in enumerate(zip(lines, others, strict=True)) if len(set(pair)) > 1] == [start + 3]
    assert "größer → nein" in others[start + 3]


def test_increases_of_the_loss_have_six_digits(small: Small) -> None:
    plan = replace(fxfact.plan(small), measured_loss_increase=2e-9 / 3, measured_ms=(20 / 3, 1e5 / 3))
    assert (plan.measured_loss_increase, plan.measured_ms) == (6.66667e-10, (20 / 3, 1e5 / 3))
    assert replace(plan["second"], predicted_loss_increase=1 / 3).predicted_loss_increase == 0.333333
    assert ParetoPoint(Cost(10, 20), 1e-7 / 3).predicted_loss_increase == 3.33333e-08


def test_measured_points_survive_the_file_of_the_plan(small: Small, tmp_path: Path) -> None:
    points = (
        MeasuredPoint(Cost(10, 20), predicted_loss_increase=0.5, measured_loss_increase=1e-7 / 3, metric=0.93),
        MeasuredPoint(Cost(9, None, 1.5), milliseconds=1.25),
    )
    plan = replace(fxfact.plan(small), measured_points=points, pareto_points=(ParetoPoint(Cost(8, 30), 0.25),))
    plan.save(tmp_path / "plan.json")
    loaded = fxfact.Plan.load(tmp_path / "plan.json")
    assert loaded.measured_points == loaded.pareto_front.measured == points
    assert loaded.edited("second", rank=2 * (3,)).measured_points == points


def test_plan_with_numpy_options_survives_its_file(small: Small, image: Tensor, tmp_path: Path) -> None:
    plan = fxfact.plan(
        small,
        Tucker(sweeps=np.int64(2)),  # type: ignore[arg-type]
        rank=np.int64(7),  # type: ignore[arg-type]
        multiple_of=np.int32(4),  # type: ignore[arg-type]
        example_inputs=image,
    )
    plan.save(tmp_path / "plan.json")
    assert fxfact.Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data | {"version": 5}, r"version 5 of the format.*Make the plan again"),
        (lambda data: data | {"format": "fxfact network"}, "fxfact network"),
        (lambda data: data | {"captur": "modules"}, "captur"),
        (lambda data: [data], "list"),
        (lambda data: data | {"decisions": [{"path": "x"}]}, "damaged"),
        (lambda data: data | {"network": {"params": 1}}, "damaged"),
        (lambda data: {k: v for k, v in data.items() if k != "model"}, "damaged"),
        (lambda data: data | {"decisions": [data["decisions"][0] | {"rank": [999, 999]}]}, "damaged"),
        (lambda data: data | {"decisions": [data["decisions"][0] | {"surprise": 1}]}, "damaged"),
        (lambda data: data | {"measured_ms": [1.0]}, "damaged"),
        (lambda data: data | {"decisions": [data["decisions"][0] | {"rank": None}]}, "a rewrite needs"),
        (lambda data: data | {"decisions": [data["decisions"][0] | {"factorization": {"name": "mps"}}]}, "mps"),
    ],
)
def test_damaged_plan_is_refused(small: Small, tmp_path: Path, damage: object, words: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(damage(fxfact.plan(small).to_json())))  # type: ignore[operator]
    with pytest.raises(PlanError, match=words) as caught:
        fxfact.Plan.load(path)
    assert str(path) in str(caught.value)


def test_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    for name in ("plan.json", "absent.json"):
        with pytest.raises(PlanError, match=name):
            fxfact.Plan.load(tmp_path / name)


def test_plan_that_cannot_be_written_is_refused(small: Small, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be written there"):
        fxfact.plan(small).save(tmp_path / "absent" / "plan.json")


def test_factorization_of_ones_own_is_loaded_by_its_class(small: Small) -> None:
    plan = fxfact.plan(small, "cp", kinds="conv")
    data = plan.to_json()
    for entry in data["decisions"][:2]:
        entry["factorization"]["name"] = "own"
    Own = type("Own", (), {"name": "own", "__new__": lambda cls, **options: CPMobilenet(**options)})
    with pytest.raises(PlanError, match="factorizations="):
        fxfact.Plan.from_json(data)
    assert fxfact.Plan.from_json(data, factorizations=[Own]) == replace(plan)  # type: ignore[list-item]
