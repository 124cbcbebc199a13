"""The functions that users call: what they refuse, and what they verify."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact import api
from fxfact.errors import (
    ArgumentError,
    ArgumentTypeError,
    BudgetError,
    CalibrationError,
    PlanError,
    RankError,
)
from fxfact.factorizations import Tucker
from fxfact.passes import FactorizeConvs
from tests.support import Small, apart, copied_state, has_state, skip_reasons


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
        ({"include": "thrid"}, ArgumentError, "include: no layer at 'thrid'"),
        ({"exclude": lambda path: True}, ArgumentError, "exclude: the predicate failed on \\('first'"),
    ],
)
def test_bad_arguments_are_refused_and_the_model_stays_unchanged(
    small: Small, arguments: dict[str, object], error: type, words: str
) -> None:
    before = copied_state(small)
    for call in (fxfact.plan, fxfact.factorize):
        with pytest.raises(error, match=words) as caught:
            call(small, **arguments)  # type: ignore[operator]
        assert isinstance(caught.value, fxfact.FxfactError)
        assert isinstance(caught.value, ValueError | TypeError)
    assert has_state(small, before)


def test_models_that_cannot_be_factorized_are_refused(small: Small, image: Tensor) -> None:
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


def test_other_bad_calls_are_refused(small: Small) -> None:
    with pytest.raises(ArgumentTypeError, match="generator"):
        fxfact.factorize(small, generator=42)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"fxfact\.Plan"):
        FactorizeConvs("tucker")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="not made by a plan"):
        fxfact.plan_of(small)
    with pytest.raises(ArgumentError, match="needs example_inputs"):
        fxfact.factorize(small, verify=True)


def test_verify_finds_a_wrong_graph(small: Small, image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = api.apply_plan

    def broken(*args: Any, **options: Any) -> Any:
        result = sound(*args, **options)
        result.get_submodule("second.1").stride = (1, 1)
        return result

    assert apart(small(image), fxfact.factorize(small, example_inputs=image, verify=True)(image)) < 2
    monkeypatch.setattr(api, "apply_plan", broken)
    with pytest.raises(fxfact.FxfactError, match="its graph is wrong"):
        fxfact.factorize(small, example_inputs=image, verify=True)


def test_forward_that_depends_on_the_training_mode_is_not_traced(image: Tensor) -> None:
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


def test_apply_takes_batches_or_their_statistics(classifier: nn.Module, color_images: Tensor) -> None:
    batches = color_images.split(8)
    plan = fxfact.plan(classifier, "channel_svd", rank=0.5, calibration=batches)
    one, other = (
        fxfact.apply(plan, classifier, calibration=given) for given in (batches, fxfact.calibrate(classifier, batches))
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    plain = fxfact.plan(classifier, "channel_svd", rank=0.5)
    with pytest.raises(PlanError, match="made without data"):
        fxfact.apply(plain, classifier, calibration=batches)
    with pytest.raises(ArgumentError, match="likelihood is only used with batches"):
        fxfact.apply(plan, classifier, likelihood="categorical", calibration=fxfact.calibrate(classifier, batches))


def test_apply_of_the_structure_alone_reads_no_data(classifier: nn.Module, color_images: Tensor) -> None:
    plan = fxfact.plan(classifier, "channel_svd", rank=0.5, calibration=color_images.split(8))
    unread = (pytest.fail("a batch was read") for _ in range(1))
    empty = fxfact.apply(plan, classifier, calibration=unread, weights="empty")
    assert fxfact.plan_of(empty).decisions == plan.decisions


def test_apply_cuts_batches_to_its_example_inputs_as_factorize_does(color_images: Tensor) -> None:
    class Scaled(nn.Sequential):
        def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
            return super().forward(x * scale)

    torch.manual_seed(0)
    model = Scaled(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    batches = [(part, torch.tensor(3.0)) for part in color_images.split(8)]
    asked = {"calibration": batches, "example_inputs": batches[0], "likelihood": "categorical"}
    small = fxfact.factorize(model, "channel_svd", rank=0.5, **asked)
    again = fxfact.apply(fxfact.plan_of(small), model, **asked)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    without = fxfact.apply(fxfact.plan_of(small), model, calibration=batches, likelihood="categorical")
    assert any(not torch.equal(a, b) for a, b in zip(small.parameters(), without.parameters(), strict=True))


# Calls that rewrite nothing


def test_call_that_rewrites_nothing_warns_with_the_most_frequent_reasons(image: Tensor) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(4, 4, 1) for _ in range(3)),
        *(nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(2)),
        nn.Conv2d(4, 4, 3, padding=1),
    ).eval()
    with pytest.warns(UserWarning, match="factorize rewrote none") as record:
        small = fxfact.factorize(model, "tucker", rank=0.5, exclude="5", example_inputs=image)
    (warning,) = record
    text = str(warning.message)
    reasons = skip_reasons(small)
    assert text.startswith("factorize rewrote none of the 6 layers of Sequential: 3× ")
    assert text.index(f"3× {reasons['0']}") < text.index(f"2× {reasons['3']}") < text.index("1× excluded")
    assert warning.filename == __file__
    assert small(image).equal(model(image))
    with pytest.warns(UserWarning, match="apply rewrote none of the 6 layers"):
        fxfact.apply(fxfact.plan_of(small), model)


def test_reasons_that_differ_in_details_are_counted_together() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Conv1d(3, 4, 3), nn.Conv1d(4, 5, 3))
    with pytest.warns(UserWarning, match=r"none of the 3 layers of Sequential: 3× it would grow: \d+ → \d+ para"):
        fxfact.factorize(model, "channel_svd", rank=99)


@pytest.mark.parametrize("capture", ["trace", "modules", "export"])
def test_every_front_end_warns(small: Small, image: Tensor, capture: Any) -> None:
    model: Any = torch.export.export(small, (image,)) if capture == "export" else small
    options: dict[str, Any] = {} if capture == "export" else {"example_inputs": image, "capture": capture}
    with pytest.warns(UserWarning, match="factorize rewrote none of the 3 layers"):
        fxfact.factorize(model, include="first", rank={"first": fxfact.ranks.Energy(1.0)}, **options)
    with pytest.warns(UserWarning, match="factorize rewrote nothing: no convolution and no linear layer was found in"):
        fxfact.factorize(nn.Sequential(nn.ReLU()))


def test_calls_that_rewrite_something_and_empty_structures_do_not_warn(
    small: Small, image: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    fxfact.factorize(small, rank=0.5, include="second", example_inputs=image)
    plan = fxfact.plan(small, exclude="*")
    fxfact.apply(plan, small, weights="empty")
    assert not [each for each in recwarn if "rewrote" in str(each.message)]
