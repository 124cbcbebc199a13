"""Plans: what is decided, how it reads, how it is saved, edited and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact import api
from fxfact.conv import ConvSpec
from fxfact.errors import ArgumentError, ArgumentTypeError, BudgetError, CalibrationError, PlanError, RankError
from fxfact.factorizations import Tucker
from fxfact.factorizations.cp import CPMobilenet
from fxfact.passes import FactorizeConvs
from tests.support import ALL, Small, apart, by_name, params_of


@pytest.mark.parametrize("factorization", ALL, ids=by_name)
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
def test_a_plan_says_what_will_be(small: Small, image: Tensor, factorization: object, fraction: float) -> None:
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


@pytest.mark.parametrize("factorization", ALL, ids=by_name)
@pytest.mark.parametrize("rank", [0.3, 0.6, 7, fxfact.Energy(0.7)])
def test_ranks_asked_for_are_rounded_to_multiples(image: Tensor, factorization: object, rank: object) -> None:
    model = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 48, 3, padding=1), nn.Conv2d(48, 24, 1))
    asked, rounded = (
        fxfact.plan(model, factorization, rank=rank, multiple_of=number, example_inputs=image, allow_growth=True)  # type: ignore[arg-type]
        for number in (None, 4)
    )
    assert asked.rewrites
    for before in asked.rewrites:
        after = rounded[before.path]
        pairs = zip(before.rank, before.factorization.max_rank(before.spec), strict=True)
        expected = tuple(r if r == top else r // 4 * 4 for r, top in pairs)
        if all(expected):
            assert after.rank == after.factorization.clip(after.spec, expected)  # in TT one bounds the next
            assert after.after.params <= before.after.params
        else:
            assert "below the first multiple of 4" in after.reason


def test_a_plan_prints_as_a_table(small: Small, image: Tensor) -> None:
    text = str(fxfact.plan(small, rank={"second": (5, 4)}, example_inputs=image))
    assert "second" in text
    assert "tucker" in text
    assert "(5,4)" in text
    assert "no rank is given for it" in text
    assert "864 → 272 (0.31)" in text
    assert "21,600 → 9,200 (0.43)" in text
    assert "1 of 2 rewritten" in text


def test_a_plan_without_inputs_has_no_macs(small: Small) -> None:
    plan = fxfact.plan(small)
    assert plan.network.macs is None
    assert plan.after.macs is None
    assert plan["second"].after.macs is None
    assert plan["second"].input_sizes is None


def test_a_plan_that_rewrites_nothing_is_of_its_model_too(small: Small) -> None:
    nothing = fxfact.plan(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(PlanError, match="made for another model"):
        fxfact.apply(nothing, small)
    kept = fxfact.apply(fxfact.plan(small, exclude="*"), small)
    assert len(fxfact.plan_of(kept)) == 2


def test_plans_save_and_load(small: Small, image: Tensor, tmp_path: Path) -> None:
    method = {"first": CPMobilenet(sweeps=7), "second": [Tucker(keep_full_sides=True)]}
    plan = fxfact.plan(small, method, example_inputs=image)
    plan.save(tmp_path / "plan.json")
    loaded = fxfact.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert str(loaded) == str(plan)
    assert fxfact.apply(loaded, small)(image).equal(fxfact.apply(plan, small)(image))
    assert json.loads((tmp_path / "plan.json").read_text())["decisions"][0]["factorization"]["options"]["sweeps"] == 7


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data | {"version": 99}, "version"),
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
def test_a_damaged_plan_is_refused(small: Small, tmp_path: Path, damage: object, words: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(damage(fxfact.plan(small).to_json())))  # type: ignore[operator]
    with pytest.raises(PlanError, match=words) as caught:
        fxfact.Plan.load(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    for name in ("plan.json", "absent.json"):
        with pytest.raises(PlanError, match=name):
            fxfact.Plan.load(tmp_path / name)


def test_a_plan_for_another_model_is_refused_with_the_differences(small: Small) -> None:
    plan = fxfact.plan(small)
    other = Small()
    other.second = nn.Conv2d(8, 16, 3, padding=1)
    other.head = nn.Linear(16, 5)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(PlanError, match=r"second: the plan has Conv2d\(8→12, .*the model Conv2d\(8→16"):
        fxfact.apply(plan, other)
    assert all(value.equal(before[name]) for name, value in other.state_dict().items())
    with pytest.raises(PlanError, match=r"first: the plan has Conv2d.* the model nothing"):
        fxfact.apply(plan, nn.Linear(2, 2))
    with pytest.raises(PlanError, match=r"0: the plan has .* with bias, the model .* without bias"):
        fxfact.apply(fxfact.plan(nn.Sequential(nn.Conv2d(4, 4, 3))), nn.Sequential(nn.Conv2d(4, 4, 3, bias=False)))
    many = fxfact.plan(nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(6))))
    with pytest.raises(PlanError, match="and 5 more"):
        fxfact.apply(many, small)


def test_a_state_dict_loads_into_the_empty_structure(small: Small, image: Tensor) -> None:
    result = fxfact.factorize(small, "cp")
    empty = fxfact.apply(fxfact.plan_of(result), Small().eval(), weights="empty")
    empty.load_state_dict(result.state_dict())
    assert empty(image).equal(result(image))
    meta = fxfact.apply(fxfact.plan_of(result), Small().to("meta"), weights="empty")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_a_plan_can_be_edited(small: Small, image: Tensor) -> None:
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
    for change, error in (
        ({"rank": (99, 2)}, RankError),
        ({"factorization": "pointwise_svd", "rank": 2}, PlanError),
    ):
        with pytest.raises(error):
            plan.edited("second", **change)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="no convolution at 'third'"):
        plan.edited("third", rank=2)
    with pytest.raises(PlanError, match="nothing to edit"):
        fxfact.plan(small, exclude="*").edited("second", rank=2)


@pytest.mark.parametrize(
    ("rank", "first", "second"),
    [
        ("same", (7, 3), (10, 7)),
        (3, (3, 3), (3, 3)),
        (10, (8, 4), (10, 8)),
        ((5, 2), (5, 2), (5, 2)),
        ((99, 2), (8, 2), (12, 2)),
        ({"first": (5, 2), "second": 0.25}, (5, 2), (4, 3)),
        ({"sec*": 4, "*": 2}, (2, 2), (4, 4)),
        ({"*": 2, "second": 4}, (2, 2), (4, 4)),
    ],
)
def test_what_rank_accepts(small: Small, rank: object, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    plan = fxfact.plan(small, rank=rank, allow_growth=True)  # type: ignore[arg-type]
    chosen = [decision.rank for decision in plan]
    assert chosen == [None if first == (8, 4) else first, second]
    if first == (8, 4):
        assert "at full rank" in plan["first"].reason


def test_a_lowered_rank_is_remarked_and_a_named_one_is_an_error(small: Small) -> None:
    assert "lowered" in fxfact.plan(small, "channel_svd", rank=99, allow_growth=True)["second"].note
    with pytest.raises(RankError, match=r"second: channel_svd rank must be within 1 and 12 .* got 99"):
        fxfact.plan(small, "channel_svd", rank={"second": 99})


def test_what_factorization_accepts(small: Small) -> None:
    def names(request: object) -> list[str | None]:
        plan = fxfact.plan(small, request, rank=0.5)  # type: ignore[arg-type]
        return [decision.factorization.name if decision.factorization else None for decision in plan]

    assert names("cp") == names("CP-mobilenet") == ["cp_mobilenet"] * 2
    assert names(Tucker(sweeps=2)) == ["tucker"] * 2
    assert names(["pointwise_svd", "tt"]) == ["tt"] * 2
    assert names({"first": "tt"}) == ["tt", None]
    assert names({"first": ["pointwise_svd"], "*": "cp"}) == [None, "cp_mobilenet"]


def test_include_and_exclude(small: Small) -> None:
    def rewritten(**selection: object) -> list[str]:
        return [decision.path for decision in fxfact.plan(small, **selection).rewrites]  # type: ignore[arg-type]

    assert rewritten(include="first") == ["first"]
    assert rewritten(include=["f*", "s*"], exclude="*d") == ["first"]
    assert rewritten(exclude=lambda path, spec: spec.stride != (1, 1)) == ["first"]
    assert rewritten(include=lambda path, spec: isinstance(spec, ConvSpec) and path == "second") == ["second"]
    assert "excluded" in fxfact.plan(small, exclude="first")["first"].reason


def test_what_is_excluded_is_not_asked_for_a_rank() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, (3, 1)))  # TT has three ranks on one, two on the other
    assert [d.path for d in fxfact.plan(model, "tt", rank=(4, 4, 4), exclude="1").rewrites] == ["0"]


def test_growth_is_refused_unless_allowed(image: Tensor) -> None:
    model = nn.Conv2d(4, 4, 3, padding=1)
    (decision,) = fxfact.plan(model, "tt", rank=10**6, example_inputs=image)
    assert decision.factorization is None
    assert "parameters" in decision.reason
    assert "MACs" in decision.reason
    (grown,) = fxfact.plan(model, "tt", rank=10**6, example_inputs=image, allow_growth=True)
    assert grown.after.exceeds(grown.before)
    strided = nn.Conv2d(32, 32, 3, stride=4, padding=1)  # fewer parameters, but the first stage runs before the stride
    (decision,) = fxfact.plan(strided, rank=0.5, example_inputs=torch.zeros(1, 32, 16, 16))
    assert "parameters" not in decision.reason
    assert "MACs" in decision.reason
    assert fxfact.plan(strided, rank=0.5).rewrites


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"rank": 0}, RankError, "positive"),
        ({"rank": -2}, RankError, "positive"),
        ({"rank": -0.5}, RankError, "positive"),
        ({"rank": float("nan")}, RankError, "nan"),
        ({"rank": float("inf")}, RankError, "inf"),
        ({"rank": "large"}, RankError, "'same'"),
        ({"rank": (2, 3, 4)}, RankError, "first: tucker has 2 ranks"),
        ({"rank": (2, 0.5)}, RankError, "ints"),
        ({"rank": 8.0}, RankError, "Pass 8 for the rank 8"),
        ({"rank": b"ab"}, ArgumentTypeError, "bytes"),
        ({"rank": ()}, RankError, "tuple"),
        ({"rank": b"same"}, ArgumentTypeError, "bytes"),
        ({"rank": True}, ArgumentTypeError, "bool"),
        ({"rank": {"second": 0}}, RankError, "second: a rank must be positive"),
        ({"rank": {"secnod": 3}}, ArgumentError, "Did you mean 'second'"),
        ({"rank": {"second": (13, 4)}}, RankError, "second: tucker rank must be within"),
        ({"factorization": "tuker"}, ArgumentError, "Did you mean 'tucker'"),
        ({"factorization": []}, ArgumentError, "empty"),
        ({"factorization": 3}, ArgumentTypeError, "name"),
        ({"factorization": Tucker}, ArgumentTypeError, "name"),
        ({"factorization": {"third": "cp"}}, ArgumentError, "nothing to factorize at 'third'"),
        ({"budget": 0.5}, ArgumentTypeError, "must be fxfact.Macs"),
        ({"budget": fxfact.Params(0.5), "rank": 0.5}, ArgumentError, "not both"),
        ({"budget": fxfact.Macs(0.5)}, BudgetError, "example_inputs"),
        ({"multiple_of": 2.0}, ArgumentError, "multiple_of must be an int"),
        ({"budget": fxfact.Params(0.5), "multiple_of": 0}, ArgumentError, "multiple_of"),
        ({"budget": fxfact.Loss(0.1)}, CalibrationError, "pass two or more"),
        ({"calibration": 5}, CalibrationError, "iterable of batches"),
        ({"capture": "dynamo"}, ArgumentError, "'auto', 'trace', 'modules', 'export'"),
        ({"capture": "export"}, ArgumentError, r"torch\.export\.export"),
        ({"executor": 2}, ArgumentTypeError, "Executor"),
        ({"progress": "yes"}, ArgumentTypeError, "tqdm"),
        ({"include": 3}, ArgumentTypeError, "include"),
        ({"exclude": [3]}, ArgumentTypeError, "exclude"),
        ({"include": "thrid"}, ArgumentError, "include: no convolution at 'thrid'"),
        ({"exclude": lambda path: True}, ArgumentError, "exclude: the predicate failed on \\('first'"),
    ],
)
def test_bad_arguments_are_refused(small: Small, arguments: dict[str, object], error: type, words: str) -> None:
    before = {name: value.clone() for name, value in small.state_dict().items()}
    for call in (fxfact.plan, fxfact.factorize):
        with pytest.raises(error, match=words) as caught:
            call(small, **arguments)  # type: ignore[operator]
        assert isinstance(caught.value, fxfact.FxfactError)
        assert isinstance(caught.value, ValueError | TypeError)
    assert all(value.equal(before[name]) for name, value in small.state_dict().items())


def test_integers_of_numpy_are_integers(small: Small, image: Tensor, tmp_path: Path) -> None:
    numbers: dict[str, Any] = {"rank": np.int64(7), "multiple_of": np.int32(4), "example_inputs": image}
    method = Tucker(sweeps=np.int64(2))  # type: ignore[arg-type]
    plan = fxfact.plan(small, method, **numbers)
    assert str(plan) == str(fxfact.plan(small, Tucker(sweeps=2), rank=7, multiple_of=4, example_inputs=image))
    plan.save(tmp_path / "plan.json")
    assert fxfact.Plan.load(tmp_path / "plan.json") == plan


def test_bad_models_are_refused(small: Small, image: Tensor) -> None:
    class Uncopyable(nn.Module):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise RuntimeError("there is only one of me")

    lazy = nn.Sequential(nn.LazyConv2d(4, 3))
    for model, words in (
        (torch.relu, "torch.nn.Module"),
        (Uncopyable(), "cannot be copied"),
        (lazy, "0.weight: the parameter is lazy"),
        (torch.jit.trace(small, image), "ScriptModule"),
    ):
        with pytest.raises(fxfact.FxfactError, match=words):
            fxfact.factorize(model)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "meta"])
def test_bad_weights_are_refused_by_name_and_nothing_is_half_changed(small: Small, bad: float | str) -> None:
    if isinstance(bad, str):
        small.second.to("meta")
    else:
        small.second.weight.data[3, 1, 0, 2] = bad
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with pytest.raises(fxfact.FxfactError, match=r"^second: the weight"):
        fxfact.factorize(small)
    assert {name for name, _ in small.named_modules()} == {name for name, _ in Small().named_modules()}
    assert all(v.is_meta or v.nan_to_num().equal(before[k].nan_to_num()) for k, v in small.state_dict().items())
    assert fxfact.factorize(small, exclude="second").get_submodule("first.0") is not None


def test_other_bad_calls_are_refused(small: Small) -> None:
    plan = fxfact.plan(small)
    with pytest.raises(ArgumentError, match="'decompose' or 'empty'"):
        fxfact.apply(plan, small, weights="random")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"fxfact\.Plan"):
        fxfact.apply("plan", small)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="generator"):
        fxfact.factorize(small, generator=42)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"fxfact\.Plan"):
        FactorizeConvs("tucker")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="not made by a plan"):
        fxfact.plan_of(small)
    with pytest.raises(ArgumentError, match="needs example_inputs"):
        fxfact.factorize(small, verify=True)


def test_verification_finds_a_wrong_graph(small: Small, image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(plan, captured, decomposing):  # type: ignore[no-untyped-def]
        result = sound(plan, captured, decomposing)
        result.get_submodule("second.1").stride = (1, 1)
        return result

    sound = api.carry_out
    assert apart(small(image), fxfact.factorize(small, example_inputs=image, verify=True)(image)) < 2
    monkeypatch.setattr(api, "apply_plan", broken)
    with pytest.raises(fxfact.FxfactError, match="its graph is wrong"):
        fxfact.factorize(small, example_inputs=image, verify=True)


def test_what_depends_on_the_training_mode_is_not_traced(image: Tensor) -> None:
    class Forgetful(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if self.training else 1.0)

    model = Forgetful().train()
    with pytest.raises(fxfact.FxfactError, match=r"self\.training"):
        fxfact.factorize(model, example_inputs=image, capture="trace")
    result = fxfact.factorize(model, example_inputs=image, verify=True)
    assert fxfact.plan_of(result).capture == "modules"
    assert model.training
    assert result.training


def test_a_factorization_of_ones_own_is_loaded_by_its_class(small: Small, tmp_path: Path) -> None:
    plan = fxfact.plan(small, "cp")
    data = plan.to_json()
    for entry in data["decisions"]:
        entry["factorization"]["name"] = "own"
    Own = type("Own", (), {"name": "own", "__new__": lambda cls, **options: CPMobilenet(**options)})
    with pytest.raises(PlanError, match="factorizations="):
        fxfact.Plan.from_json(data)
    assert fxfact.Plan.from_json(data, factorizations=[Own]) == replace(plan)  # type: ignore[list-item]
