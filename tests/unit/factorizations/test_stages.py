"""Ranks, layouts, and the stages that they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fxfact.conv import ConvSpec
from fxfact.errors import RankError, RefusedError
from fxfact.factorizations import TT, ChannelSVD, CPFactorized, Tucker
from fxfact.factorizations.stages import pointwise, split_axes, stages_along
from tests.support import random_layer

PLAIN = ConvSpec.parse(6, 8, (3, 3))
CUBE = ConvSpec.parse(6, 8, (3, 1, 5), stride=(2, 3, 1), padding=(1, 0, 2), padding_mode="reflect")


def test_pointwise_keeps_the_number_of_axes() -> None:
    assert pointwise(CUBE, 6, 4) == ConvSpec.parse(6, 4, 1, order=3)


@pytest.mark.parametrize(
    ("kernel_size", "axes"),
    [((3, 3), ((0,), (1,))), ((3, 1, 5), ((0,), (1, 2))), ((1, 3, 1), ((0, 1, 2),)), ((1, 1), ())],
)
def test_axes_of_size_one_join_the_next_stage(kernel_size: tuple[int, ...], axes: tuple[tuple[int, ...], ...]) -> None:
    assert split_axes(ConvSpec.parse(6, 8, kernel_size)) == axes


def test_stages_along_axes_do_nothing_on_the_others() -> None:
    first, middle, last = stages_along(CUBE, ((), (0,), (1, 2)), (6, 4, 4, 8), depthwise=False)
    assert first == pointwise(CUBE, 6, 4)
    assert (middle.kernel_size, middle.stride, middle.padding) == ((3, 1, 1), (2, 1, 1), ((1, 1), (0, 0), (0, 0)))
    assert (last.kernel_size, last.stride, last.padding) == ((1, 1, 5), (1, 3, 1), ((0, 0), (0, 0), (2, 2)))
    assert middle.padding_mode == last.padding_mode == "reflect"
    assert [stage.groups for stage in stages_along(CUBE, ((), (0, 1, 2), ()), (6, 4, 4, 8), depthwise=True)] == [
        1,
        4,
        1,
    ]


@pytest.mark.parametrize("rank", [(0, 2), (2, -1), (9, 2), (2, 7), (2,), (2, 2, 2)])
def test_impossible_rank_is_refused(rank: tuple[int, ...]) -> None:
    with pytest.raises(RankError, match="tucker"):
        Tucker().layout(PLAIN, rank)
    with pytest.raises(RankError, match="tucker"):
        Tucker().layouts(PLAIN, [(2, 2), rank])


@pytest.mark.parametrize("rank", [[2, 2], 4, (2,), (2, 2, 2), (2.0, 2), ("2", 2)])
def test_rank_of_another_type_or_length_is_refused_with_the_length(rank: Any) -> None:
    layer = random_layer(ConvSpec.parse(8, 8, (3, 3)))
    calls: list[Callable[[], Any]] = [
        lambda: Tucker().decompose(layer, rank),
        lambda: Tucker().layout(layer.spec, rank),
        lambda: Tucker().clip(layer.spec, rank),
    ]
    for call in calls:
        with pytest.raises(RankError, match="has 2 ranks"):
            call()


def test_rejected_convolution_is_refused_with_the_reason() -> None:
    spec = ConvSpec.parse(6, 8, (1, 1))
    calls: list[Callable[[], Any]] = [
        lambda: Tucker().max_rank(spec),
        lambda: Tucker().smallest_rank(spec),
        lambda: Tucker().clip(spec, (1, 1)),
        lambda: Tucker().layout(spec, (1, 1)),
        lambda: Tucker().ranks(spec),
        lambda: Tucker().ranks_within(spec, 0.5),
        lambda: Tucker().tensorly_rank(spec, 0.5),
    ]
    for call in calls:
        with pytest.raises(RefusedError, match=r"use svd \(Conv2d\(6→8, 1×1\)\)"):
            call()


def test_ranks_are_proportional_to_the_largest_and_leave_out_the_convolution_itself() -> None:
    assert Tucker().ranks(ConvSpec.parse(2, 4, (3, 3))) == ((1, 1), (2, 1), (3, 1))
    assert Tucker(keep_full_sides=True).ranks(ConvSpec.parse(2, 4, (3, 3))) == ((1, 1), (2, 1), (3, 1), (4, 2))
    assert ChannelSVD().ranks(ConvSpec.parse(3, 3, (3, 3))) == ((1,), (2,), (3,))
    assert TT().ranks(ConvSpec.parse(1, 2, (2, 2)))[-1] == TT().max_rank(ConvSpec.parse(1, 2, (2, 2)))


def test_layout_of_groups_has_the_groups_in_every_stage_and_the_bias_in_the_last() -> None:
    stages = CPFactorized().layout(ConvSpec.parse(6, 8, (3, 5), groups=2, bias=True), (4,))
    assert [(s.in_channels, s.out_channels, s.groups, s.bias) for s in stages] == [
        (6, 8, 2, False),
        (8, 8, 8, False),
        (8, 8, 8, False),
        (8, 8, 2, True),
    ]
