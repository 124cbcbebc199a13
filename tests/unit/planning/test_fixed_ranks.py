"""Factorizations and ranks as the caller states them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.capture import capture
from fxfact.errors import ArgumentError, RankError
from fxfact.factorizations import Tucker
from fxfact.planning import ByPath, FixedRanks, SearchScope, build_plan, parse_factorizations
from tests.support import ALL, Small, by_name, quick


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
def test_rank_is_one_for_all_layers_or_by_path(
    small: Small, rank: object, first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    plan = fxfact.plan(small, rank=rank, allow_growth=True)  # type: ignore[arg-type]
    assert plan["head"].reason in ("the weight of a linear layer is a matrix: use svd", "no rank is given for it")
    chosen = [decision.rank for decision in plan]
    assert chosen == [None if first == (8, 4) else first, second, None]
    if first == (8, 4):
        assert "at full rank" in plan["first"].reason


def test_factorization_is_one_for_all_layers_or_a_list_or_by_path(small: Small) -> None:
    def names(request: object) -> list[str | None]:
        plan = fxfact.plan(small, request, rank=0.5)  # type: ignore[arg-type]
        return [decision.factorization.name if decision.factorization else None for decision in plan]

    assert names("svd") == [None, None, "svd"]
    assert names(["tucker", "svd"]) == ["tucker", "tucker", "svd"]
    assert names("cp") == names("CP-mobilenet") == ["cp_mobilenet"] * 2 + [None]
    assert names(Tucker(sweeps=2)) == ["tucker"] * 2 + [None]
    assert names(["svd", "tt"]) == ["tt", "tt", "svd"]
    assert names({"first": "tt"}) == ["tt", None, None]
    assert names({"first": ["svd"], "*": "cp"}) == [None, "cp_mobilenet", None]


def test_rank_that_is_too_large_is_lowered_with_a_note_or_refused_if_its_path_was_given(small: Small) -> None:
    assert "lowered" in fxfact.plan(small, "channel_svd", rank=99, allow_growth=True)["second"].note
    with pytest.raises(RankError, match=r"second: channel_svd rank must be within 1 and 12 .* got 99"):
        fxfact.plan(small, "channel_svd", rank={"second": 99})


@pytest.mark.parametrize("factorization", [*map(quick, ALL)], ids=by_name)
@pytest.mark.parametrize("rank", [0.3, 0.6, 7, fxfact.ranks.Energy(0.7)])
def test_multiple_of_rounds_requested_ranks_down(image: Tensor, factorization: object, rank: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 20, 1))
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


def test_numpy_integers_are_ints(small: Small, image: Tensor) -> None:
    numbers: dict[str, Any] = {"rank": np.int64(7), "multiple_of": np.int32(4), "example_inputs": image}
    plan = fxfact.plan(small, Tucker(sweeps=np.int64(2)), **numbers)  # type: ignore[arg-type]
    assert str(plan) == str(fxfact.plan(small, Tucker(sweeps=2), rank=7, multiple_of=4, example_inputs=image))


# ByPath


def test_by_path_takes_the_exact_path_first_then_the_first_glob_that_fits() -> None:
    by_path = ByPath.parse({"*": 1, "a*": 2, "ab": 3}, int)
    assert [by_path.get(path) for path in ("ab", "ac", "b")] == [(3, True), (1, False), (1, False)]
    assert ByPath.parse({"a": 1}, int).get("b") == (None, False)
    assert ByPath.parse(5, int).get("anything") == (5, False)


def test_by_path_names_the_pattern_of_a_bad_value() -> None:
    with pytest.raises(ArgumentError, match=r"^b\*: "):
        ByPath.parse({"a": "cp", "b*": "tuker"}, parse_factorizations)


def test_by_path_refuses_patterns_that_fit_no_path() -> None:
    by_path = ByPath.parse({"layer1.*": 1}, int)
    by_path.check(["layer1.conv"], "rank")
    with pytest.raises(ArgumentError, match=r"rank: nothing to factorize at 'layer1.\*'.*There are: a, b, c, d, e and"):
        by_path.check([*"abcdefg"], "rank")
    with pytest.raises(ArgumentError, match="There are: none at all"):
        by_path.check([], "rank")


# FixedRanks


def test_fixed_ranks_gives_the_reason_of_every_factorization_that_was_tried(small: Small) -> None:
    strategy = FixedRanks.parse(["svd", "cp"], 1e-3)
    reason = build_plan(capture(small, None), strategy, SearchScope())["second"].reason
    assert "1×1" in reason
    assert "even at rank 1 cp_mobilenet has more than 0.001 of the parameters" in reason


def test_fixed_ranks_of_a_part_of_a_network_may_have_patterns_that_fit_nothing(small: Small) -> None:
    captured = capture(small, None)
    strategy = FixedRanks.parse("tucker", {"second": 4, "elsewhere": 3})
    with pytest.raises(ArgumentError, match="nothing to factorize at 'elsewhere'"):
        build_plan(captured, strategy, SearchScope())
    partial = FixedRanks(strategy.factorizations, strategy.ranks, partial=True)
    assert [decision.path for decision in build_plan(captured, partial, SearchScope()).rewrites] == ["second"]
