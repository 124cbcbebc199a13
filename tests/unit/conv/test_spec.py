"""Descriptions of convolutions, and the costs of chains."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxfact.conv import ConvLayer, ConvSpec, Cost, chain_cost, format_spec_forms, pad_amounts, read_conv
from fxfact.errors import SpecError
from tests.support import SPECS, random_input


def test_same_padding_is_parsed_as_torch_pads() -> None:
    spec = ConvSpec.parse(1, 1, (4, 3), padding="same", dilation=(3, 1))
    assert spec.padding == ((4, 5), (1, 1))
    assert spec.output_size((20, 20)) == (20, 20)
    assert pad_amounts(spec.padding) == [1, 1, 4, 5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kernel_size": 3}, "order="),
        ({"kernel_size": (3, 3), "order": 3}, "kernel_size"),
        ({"kernel_size": (3, 3), "stride": (1, 1, 1)}, "stride"),
        ({"kernel_size": (3, 3), "stride": 2, "padding": "same"}, "stride 1"),
        ({"kernel_size": (3, 3), "padding": "full"}, "'same' or 'valid'"),
        ({"kernel_size": (3, 0)}, "at least 1"),
        ({"kernel_size": (3, 3), "padding": -1}, "negative"),
        ({"kernel_size": (3, 3), "groups": 3}, "groups=3"),
        ({"kernel_size": (3, 3), "padding_mode": "mirror"}, "mirror"),
        ({"kernel_size": (1, 1, 1, 1)}, "0, 1, 2 or 3"),
        ({"kernel_size": (3.5, 3)}, "ints"),
        ({"kernel_size": (3, 3), "groups": True}, "ints"),
        ({"kernel_size": (3, 3), "output_padding": 1}, "only a transposed"),
        ({"kernel_size": (3, 3), "padding_mode": "reflect", "transposed": True}, "symmetric zero padding"),
    ],
)
def test_values_that_describe_no_convolution_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        ConvSpec.parse(4, 4, **arguments)  # type: ignore[arg-type]


def test_fields_of_the_wrong_length_are_refused() -> None:
    spec = ConvSpec.parse(4, 6, (3, 1))
    with pytest.raises(SpecError, match="a pair"):
        replace(spec, padding=(1, 1))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"stride=\(1,\) must have 2 entries"):
        replace(spec, stride=(1,))
    with pytest.raises(SpecError, match=r"stride=\(1, 1\) must have 0 entries"):
        replace(spec, kernel_size=())


def test_a_linear_layer_is_the_convolution_without_spatial_axes() -> None:
    spec = ConvSpec.linear(6, 8, bias=True)
    assert (spec.order, spec.kind, spec.is_pointwise, str(spec)) == (0, "linear", True, "Linear(6→8)")
    assert (spec.weight_shape, spec.params) == ((8, 6), 8 * 6 + 8)
    assert spec.output_size((5, 7)) == (5, 7)
    assert spec.macs((5, 7)) == 5 * 7 * 6 * 8
    assert spec.output_shape((2, 5, 6)) == (2, 5, 8)
    assert ConvSpec.linear(6, 8, transposed=True).torch_weight_shape == (6, 8)
    assert ConvSpec.parse(6, 8, (3, 3), padding=1).output_shape((2, 6, 5, 5)) == (2, 8, 5, 5)
    assert ConvSpec.parse(6, 8, (3, 3)).kind == "conv"
    for change in ({"groups": 2}, {"padding_mode": "reflect"}):
        with pytest.raises(SpecError, match="no groups and no padding"):
            replace(spec, **change)


def test_a_spec_reads_like_torch() -> None:
    assert str(SPECS["strided"]) == "Conv2d(6→8, 3×5, stride (2,1), padding (1,2))"
    assert str(SPECS["reflect"]) == "Conv2d(6→5, 3×3, padding 1, reflect)"
    assert math.prod(SPECS["groups"].weight_shape) == 12 * 4 * 9


def test_a_spec_comes_back_from_json(spec: ConvSpec) -> None:
    assert ConvSpec.from_json(json.loads(json.dumps(vars(spec)))) == spec
    with pytest.raises(TypeError):
        ConvSpec.from_json({"in_channels": 4})


def test_the_block_is_the_convolution_of_one_group(spec: ConvSpec) -> None:
    block = spec.block
    assert (block is spec) == (spec.groups == 1)
    assert block.groups == 1
    assert block.weight_shape[1:] == spec.weight_shape[1:]
    assert block.out_channels * spec.groups == spec.out_channels
    assert replace(block, in_channels=spec.in_channels, out_channels=spec.out_channels, groups=spec.groups) == spec


def test_pointwise_convolutions_do_nothing_in_space() -> None:
    assert ConvSpec.parse(6, 8, (1, 1), dilation=2, groups=2).is_pointwise
    assert ConvSpec.parse(6, 8, (1, 1), transposed=True).is_pointwise
    for arguments in ({"stride": 2}, {"padding": 1}, {"stride": 2, "output_padding": 1, "transposed": True}):
        assert not ConvSpec.parse(6, 8, (1, 1), **arguments).is_pointwise  # type: ignore[arg-type]
    assert not ConvSpec.parse(6, 8, (1, 3)).is_pointwise


def test_macs_are_half_of_the_flops_that_torch_counts(torch_conv: nn.Module) -> None:
    layer = read_conv(torch_conv)
    assert isinstance(layer, ConvLayer)
    x = random_input(layer.spec, torch.float32)
    with FlopCounterMode(display=False) as counter:
        torch_conv.float()(x)
    assert 2 * 2 * layer.spec.macs(tuple(x.shape[2:])) == counter.get_total_flops()  # a batch of 2, a MAC is 2 FLOPs


def test_chain_cost_follows_the_shrinking_map_and_sums_over_calls() -> None:
    stages = [ConvSpec.parse(4, 8, (3, 3), stride=2, padding=1), ConvSpec.parse(8, 6, (1, 1), bias=True)]
    params, macs = 4 * 8 * 9 + 8 * 6 + 6, 4 * 8 * 9 * 16 + 8 * 6 * 16
    assert chain_cost(stages, [(8, 8)]) == Cost(params, macs)
    assert chain_cost(stages, [(8, 8), (8, 8)]) == Cost(params, 2 * macs)
    assert chain_cost(stages, None) == Cost(params, None)
    assert chain_cost(stages, [(8, 8)], tied=True) == Cost(6, macs), "tied chains store only their biases"


def test_short_form_of_a_spec_has_its_channels_kernel_size_and_groups() -> None:
    spec = ConvSpec.parse(8, 12, (3, 5), stride=2, padding=1)
    assert format_spec_forms(spec) == (str(spec), "8→12, 3×5")
    assert format_spec_forms(ConvSpec.parse(8, 8, 3, groups=8, order=1))[1] == "8→8, 3, groups 8"
    assert format_spec_forms("Linear(12→5)") == ("Linear(12→5)", "12→5")
    assert format_spec_forms(None) == ("", "")
