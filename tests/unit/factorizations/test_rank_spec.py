"""Ranks as callers write them."""

from __future__ import annotations

import numpy as np
import pytest

from fxfact.conv import ConvSpec, Skip
from fxfact.errors import ArgumentError, ArgumentTypeError, RankError
from fxfact.factorizations import (
    SVD,
    CPMobilenet,
    Tucker,
    parse_factorization,
    parse_rank_spec,
    resolve_rank,
)

SPEC = ConvSpec.parse(6, 8, (3, 3))


@pytest.mark.parametrize(
    ("request_", "parsed"),
    [("same", 1.0), (3, 3), (np.int64(3), 3), (0.5, 0.5), (1.7, 1.7), ((2, 3), (2, 3)), ([np.int32(2), 3], (2, 3))],
)
def test_rank_becomes_an_int_a_float_or_a_tuple(request_: object, parsed: object) -> None:
    found = parse_rank_spec(request_)
    assert found == parsed
    assert type(found) is type(parsed)


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        ("half", RankError, "'same', got 'half'"),
        (0, RankError, "positive"),
        (float("nan"), RankError, "finite"),
        (8.0, RankError, "Pass 8 for the rank 8"),
        ((2, 0.5), RankError, "ints"),
        ((), RankError, "ints"),
        (True, ArgumentTypeError, "bool"),
        (None, ArgumentTypeError, "NoneType"),
        (b"3", ArgumentTypeError, "bytes"),
    ],
)
def test_rank_that_means_nothing_is_refused(request_: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        parse_rank_spec(request_)


def test_int_applies_to_every_entry_and_is_lowered() -> None:
    assert resolve_rank(Tucker(), SPEC, 4, clip=False) == (4, 4)
    assert resolve_rank(Tucker(), SPEC, 7, clip=False) == (7, 6)
    assert resolve_rank(CPMobilenet(), SPEC, 999, clip=False) == (999,)
    assert resolve_rank(CPMobilenet(), SPEC, 999, clip=True) == (48,)


def test_tuple_is_lowered_on_request_and_must_have_the_right_length() -> None:
    assert resolve_rank(Tucker(), SPEC, (99, 2), clip=True) == (8, 2)
    assert resolve_rank(Tucker(), SPEC, (99, 2), clip=False) == (99, 2)
    with pytest.raises(RankError, match="has 2 ranks"):
        resolve_rank(Tucker(), SPEC, (2, 2, 2), clip=True)


def test_fraction_is_of_the_parameters_or_follows_tensorly() -> None:
    assert resolve_rank(Tucker(), SPEC, 0.5, clip=True) == Tucker().rank_within(SPEC, 0.5)
    assert resolve_rank(Tucker(), SPEC, 0.5, clip=True, rule="tensorly") == Tucker().tensorly_rank(SPEC, 0.5)


def test_no_rank_is_a_reason() -> None:
    too_small = resolve_rank(Tucker(keep_full_sides=True), SPEC, 0.01, clip=True)
    assert isinstance(too_small, Skip)
    assert "even at rank 1 tucker has more than 0.01" in too_small.reason
    assert isinstance(resolve_rank(SVD(), SPEC, 3, clip=True), Skip)


def test_factorization_is_parsed_from_its_name_in_any_spelling() -> None:
    assert parse_factorization("cp") == parse_factorization("CP-Mobilenet") == CPMobilenet()
    own = Tucker(sweeps=2)
    assert parse_factorization(own) is own
    with pytest.raises(ArgumentError, match=r"unknown factorization 'tuker'. Did you mean 'tucker'\?"):
        parse_factorization("tuker")
    with pytest.raises(ArgumentTypeError, match="factorization must be a name or a"):
        parse_factorization(Tucker)
