"""Costs: sums, comparisons and how they are printed."""

from __future__ import annotations

import pytest

from fxfact.conv import Cost, format_amount, format_change, format_change_forms, format_short


def test_costs_add_up_and_unknown_parts_stay_unknown() -> None:
    assert Cost(10, 100, 1.0) + Cost(2, 30, 0.5) == Cost(12, 130, 1.5)
    assert Cost(10, 100, 1.0) - Cost(2, 30, 0.5) == Cost(8, 70, 0.5)
    assert Cost(10, None) + Cost(2, 30, 0.5) == Cost(12, None, None)
    assert Cost(10, 100) - Cost(2, None) == Cost(8, None)


def test_a_cost_exceeds_another_in_parameters_or_in_macs() -> None:
    assert Cost(11, 90).exceeds(Cost(10, 100))
    assert Cost(9, 101).exceeds(Cost(10, 100))
    assert not Cost(10, 100).exceeds(Cost(10, 100))
    assert not Cost(10, 101).exceeds(Cost(10, None)), "MACs that are not known are not compared"


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (2000, 1000, "2,000 → 1,000 (0.50)"),
        (2000, 2000, "2,000"),
        (0, 5, "0 → 5"),
        (1.23456, 0.5, "1.23 → 0.5 (0.41)"),
        (None, 5, ""),
        (5, None, ""),
    ],
)
def test_a_change_shows_both_amounts_and_their_ratio(before: float | None, after: float | None, text: str) -> None:
    assert format_change(before, after) == text


def test_amounts_have_separators_or_three_digits() -> None:
    assert format_amount(1234567) == "1,234,567"
    assert format_amount(12.3456) == "12.3"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (1234, "1.23k"),
        (999_499, "999k"),
        (999_500, "1M"),
        (40_551_040, "40.6M"),
        (2_500_000_000, "2.5G"),
        (-3_000_000_000_000, "-3T"),
        (1234.5, "1.23e+03"),
        (0.25, "0.25"),
    ],
)
def test_short_amounts_have_three_digits_and_a_unit(number: float, text: str) -> None:
    assert format_short(number) == text


@pytest.mark.parametrize(("before", "after"), [(2000, 1000), (2000, 2000), (0, 5), (1.5, 0.5), (None, 5), (5, None)])
def test_forms_of_a_change_become_shorter(before: float | None, after: float | None) -> None:
    forms = format_change_forms(before, after)
    assert forms[0] == format_change(before, after)
    assert sorted(map(len, forms), reverse=True) == list(map(len, forms))
    assert bool(forms[-1]) == (before is not None and after is not None)
