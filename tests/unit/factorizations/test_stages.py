"""Stages of chains."""

from __future__ import annotations

import pytest

from fxfact.conv import ConvSpec
from fxfact.factorizations.stages import pointwise, split_axes, stages_along

SPEC = ConvSpec.parse(6, 8, (3, 1, 5), stride=(2, 3, 1), padding=(1, 0, 2), padding_mode="reflect")


def test_pointwise_keeps_the_number_of_axes() -> None:
    assert pointwise(SPEC, 6, 4) == ConvSpec.parse(6, 4, 1, order=3)


@pytest.mark.parametrize(
    ("kernel_size", "axes"),
    [((3, 3), ((0,), (1,))), ((3, 1, 5), ((0,), (1, 2))), ((1, 3, 1), ((0, 1, 2),)), ((1, 1), ())],
)
def test_axes_of_size_one_join_the_next_stage(kernel_size: tuple[int, ...], axes: tuple[tuple[int, ...], ...]) -> None:
    assert split_axes(ConvSpec.parse(6, 8, kernel_size)) == axes


def test_stages_along_axes_do_nothing_on_the_others() -> None:
    first, middle, last = stages_along(SPEC, ((), (0,), (1, 2)), (6, 4, 4, 8), depthwise=False)
    assert first == pointwise(SPEC, 6, 4)
    assert (middle.kernel_size, middle.stride, middle.padding) == ((3, 1, 1), (2, 1, 1), ((1, 1), (0, 0), (0, 0)))
    assert (last.kernel_size, last.stride, last.padding) == ((1, 1, 5), (1, 3, 1), ((0, 0), (0, 0), (2, 2)))
    assert middle.padding_mode == last.padding_mode == "reflect"
    assert [stage.groups for stage in stages_along(SPEC, ((), (0, 1, 2), ()), (6, 4, 4, 8), depthwise=True)] == [
        1,
        4,
        1,
    ]
