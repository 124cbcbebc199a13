"""What a plan says about the call that made it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfact
from fxfact.factorizations import Tucker
from fxfact.planning import describe_call, format_call
from tests.support import Small


def leave_out(path: str, spec: object) -> bool:
    return path == "first"


class Endless:
    """Batches without a number."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.randn(4, 4, 13, 13)] * 2)


IMAGE = torch.zeros(1, 4, 13, 13)
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "defaults": ({"capture": "auto", "allow_growth": False, "leaf_modules": ()}, {}),
    "numbers and tensors": (
        {"rank": 0.25, "multiple_of": 2, "example_inputs": IMAGE},
        {"rank": 0.25, "multiple_of": 2, "example_inputs": "float32 (1, 4, 13, 13)"},
    ),
    "mappings": ({"rank": {"second": (3, 2)}, "factorization": "tucker"}, {"rank": {"second": [3, 2]}}),
    "objects": (
        {"factorization": [Tucker(sweeps=3), "cp"], "rank": fxfact.ranks.Energy(0.5)},
        {"factorization": [{"Tucker": {"sweeps": 3}}, "cp"], "rank": {"Energy": {"share": 0.5}}},
    ),
    "functions": ({"exclude": leave_out}, {"exclude": f"{__name__}.leave_out"}),
    "a budget and batches": (
        {
            "factorization": "tucker",
            "budget": fxfact.Params(at_most=1000),
            "calibration": [torch.randn(4, 4, 13, 13)] * 2,
        },
        {"budget": {"Params": {"at_most": 1000}}, "calibration": {"list": {"batches": 2}}},
    ),
    "batches without a number": (
        {"factorization": "tucker", "budget": fxfact.Params(0.5), "calibration": Endless()},
        {"budget": {"Params": {"fraction": 0.5}}, "calibration": {"Endless": {}}},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_plans_of_all_front_doors_say_how_they_were_called(small: Small, name: str) -> None:
    options, expected = CALLS[name]
    plan = fxfact.plan(small, **options)
    found = json.loads(json.dumps(dict(plan.call)))
    assert found == plan.call
    assert {key: found[key] for key in expected} == expected
    assert found.keys() == {key for key in options if name != "defaults"}
    assert fxfact.plan_of(fxfact.factorize(small, verify=False, **options)).call == plan.call


def test_statistics_are_identified_by_a_digest(small: Small) -> None:
    batches = [torch.randn(4, 4, 13, 13, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    first, again, other = (fxfact.calibrate(small, data) for data in (batches, batches, batches[:1]))

    def described(statistics: fxfact.Statistics) -> Any:
        plan = fxfact.plan(small, "tucker", budget=fxfact.Params(0.8), calibration=statistics)
        return plan.call["calibration"]["Statistics"]

    assert described(first) == described(again)
    assert described(first)["samples"] == 8
    assert described(first)["digest"] != described(other)["digest"]


def test_versions_are_those_that_made_the_plan_and_do_not_make_plans_differ(small: Small) -> None:
    plan = fxfact.plan(small)
    assert plan.versions["torch"] == torch.__version__
    assert set(plan.versions) == {"fxfact", "torch"}
    data = plan.to_json() | {"versions": {"fxfact": "0.0", "torch": "1.0"}, "call": {"rank": 0.125}}
    loaded = fxfact.Plan.from_json(data)
    assert (dict(loaded.versions), dict(loaded.call)) == (data["versions"], data["call"])
    assert loaded == plan
    assert hash(loaded) == hash(plan)
    assert loaded.edited("first", rank=(2, 2)).versions == loaded.versions


def test_clocks_are_left_out() -> None:
    def plan(model: object, *, budget: object = None, executor: object = None) -> None: ...

    arguments = {"model": None, "budget": fxfact.Latency(at_most_ms=3, compiled=True), "executor": object()}
    assert describe_call(plan, arguments) == {"budget": {"Latency": {"at_most": 3, "compiled": True}}}


def test_call_is_written_as_python() -> None:
    call = {
        "budget": {"Macs": {"share": 0.5}},
        "calibration": {"tuple": {"batches": 4}},
        "factorization": ["tucker", {"CPMobilenet": {}}],
        "rank": {"first": 8, "*": 0.5},
        "exclude": "head",
        "allow_growth": True,
    }
    assert format_call(call) == (
        "fxfact.plan(model, budget=Macs(share=0.5), calibration=tuple(batches=4), factorization=['tucker', "
        "CPMobilenet()], rank={'first': 8, '*': 0.5}, exclude='head', allow_growth=True)"
    )
    assert format_call({}) == "fxfact.plan(model)"
