from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxfact.conv import (
    ConvChain,
    ConvLayer,
    ConvSpec,
    Skip,
    compose,
    composed_spec,
    read_conv,
    run,
    to_torch,
    write_conv,
)
from fxfact.errors import SpecError
from tests.support import SPECS, apart, random_input, random_layer

TORCH_CONVS = [
    nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    nn.Conv2d(4, 6, (2, 4), padding="same", padding_mode="reflect", bias=False),
    nn.Conv2d(4, 6, 3, padding="valid", padding_mode="circular"),
    nn.Conv1d(4, 6, 5, padding=3, padding_mode="replicate", stride=3),
    nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 2)),
    nn.ConvTranspose1d(4, 6, 5, stride=3, padding=1, output_padding=2, dilation=2),
    nn.ConvTranspose2d(4, 6, (3, 4), stride=2, padding=1, output_padding=1, groups=2, bias=False),
    nn.ConvTranspose3d(4, 6, 2, stride=2),
]


@pytest.mark.parametrize("conv", TORCH_CONVS, ids=repr)
def test_a_module_is_read_as_it_computes(conv: nn.Module) -> None:
    layer = read_conv(conv.double())
    assert isinstance(layer, ConvLayer)
    x = random_input(layer.spec)
    assert apart(conv(x), run(layer, x)) < 1e-14
    assert conv(x).shape[2:] == layer.spec.output_size(tuple(x.shape[2:]))
    assert layer.spec.params == sum(p.numel() for p in conv.parameters())
    assert to_torch(layer.spec, layer.weight).equal(conv.weight)


@pytest.mark.parametrize("conv", TORCH_CONVS, ids=repr)
def test_macs_are_half_of_what_torch_counts(conv: nn.Module) -> None:
    layer = read_conv(conv)
    assert isinstance(layer, ConvLayer)
    x = random_input(layer.spec, torch.float32)
    with FlopCounterMode(display=False) as counter:
        conv.float()(x)
    assert 2 * 2 * layer.spec.macs(tuple(x.shape[2:])) == counter.get_total_flops()  # a batch of 2, a MAC is 2 FLOPs


def test_a_written_module_computes_the_layer(spec: ConvSpec) -> None:
    layer = random_layer(spec)
    x = random_input(spec)
    modules = nn.Sequential(*write_conv(spec, layer.weight, layer.bias))
    assert apart(run(layer, x), modules(x)) < 1e-14
    assert apart(run(layer, x[0]), modules(x[0])) < 1e-14
    assert run(layer, x).shape[2:] == spec.output_size(tuple(x.shape[2:]))
    even = all(before == after for before, after in spec.padding)
    assert len(modules) == (1 if even or set(spec.stride) == {1} else 2)


def chain_of(*specs: ConvSpec) -> ConvChain:
    return ConvChain(tuple(random_layer(spec, seed=k) for k, spec in enumerate(specs)))


@pytest.mark.parametrize(
    "chain",
    [
        chain_of(ConvSpec.parse(4, 8, (3, 1), groups=4), ConvSpec.parse(8, 6, (1, 1), bias=True)),
        chain_of(ConvSpec.parse(4, 8, (1, 1), groups=2), ConvSpec.parse(8, 8, (1, 3), groups=8, padding=(0, 2))),
        chain_of(ConvSpec.parse(6, 6, (1, 1), groups=3), ConvSpec.parse(6, 4, (3, 3), groups=2, stride=2)),
        chain_of(*(ConvSpec.parse(2, 2, k, padding=k[0] // 2) for k in ((3, 1, 1), (1, 2, 1), (1, 1, 4)))),
    ],
    ids=["depthwise then dense", "nested groups", "crossing groups", "3-D"],
)
def test_a_chain_equals_the_convolution_it_composes_to(chain: ConvChain) -> None:
    whole = ConvLayer(composed_spec(chain.specs), compose(chain), chain.bias)
    x = random_input(whole.spec)
    assert apart(run(whole, x), run(chain, x)) < 1e-13
    assert (
        run(chain, x).shape[2:] == chain.output_size(tuple(x.shape[2:])) == whole.spec.output_size(tuple(x.shape[2:]))
    )
    assert chain.params == sum(layer.weight.numel() for layer in chain.layers) + (6 if chain.bias is not None else 0)


def test_chain_macs_follow_the_shrinking_map() -> None:
    chain = chain_of(ConvSpec.parse(4, 8, (3, 3), stride=2, padding=1), ConvSpec.parse(8, 6, (1, 1)))
    assert chain.macs((8, 8)) == 4 * 8 * 9 * 16 + 8 * 6 * 16


def test_same_padding_is_parsed_as_torch_pads() -> None:
    spec = ConvSpec.parse(1, 1, (4, 3), padding="same", dilation=(3, 1))
    assert spec.padding == ((4, 5), (1, 1))
    assert spec.output_size((20, 20)) == (20, 20)


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
        ({"kernel_size": (1, 1, 1, 1)}, "1, 2 or 3"),
        ({"kernel_size": (3.5, 3)}, "ints"),
        ({"kernel_size": (3, 3), "output_padding": 1}, "only a transposed"),
    ],
)
def test_what_is_no_convolution_is_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        ConvSpec.parse(4, 4, **arguments)  # type: ignore[arg-type]


def test_tensors_that_do_not_fit_are_refused() -> None:
    spec = ConvSpec.parse(4, 6, (3, 3), bias=True)
    with pytest.raises(SpecError, match="weight"):
        ConvLayer(spec, torch.zeros(6, 4, 3), torch.zeros(6))
    with pytest.raises(SpecError, match="bias"):
        ConvLayer(spec, torch.zeros(6, 4, 3, 3))
    with pytest.raises(SpecError, match="bias of"):
        ConvLayer(spec, torch.zeros(6, 4, 3, 3), torch.zeros(5))


def test_stages_that_are_no_chain_are_refused() -> None:
    one = ConvSpec.parse(4, 6, (3, 1))
    for other, words in (
        (ConvSpec.parse(5, 6, (1, 1)), "cannot follow"),
        (ConvSpec.parse(6, 6, (3, 1)), "axis 0"),
        (ConvSpec.parse(6, 6, (1, 1), stride=2), "axis 0"),
        (ConvSpec.parse(6, 6, (1, 1), padding=1), "axis 0"),
    ):
        with pytest.raises(SpecError, match=words):
            chain_of(one, other)
    with pytest.raises(SpecError, match="a pair"):
        replace(one, padding=(1, 1))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="bias"):
        chain_of(ConvSpec.parse(4, 6, (3, 1), bias=True), ConvSpec.parse(6, 6, (1, 1)))
    with pytest.raises(SpecError, match="at least one"):
        ConvChain(())


def test_the_dilation_of_a_stage_that_reaches_nowhere_means_nothing() -> None:
    chain = chain_of(ConvSpec.parse(4, 6, (1, 1), dilation=3), ConvSpec.parse(6, 5, (3, 3), padding=1))
    whole, x = composed_spec(chain.specs), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    assert whole.dilation == (1, 1)
    torch.testing.assert_close(run(ConvLayer(whole, compose(chain)), x), run(chain, x))


def test_what_is_not_simply_a_convolution_is_skipped_with_a_reason() -> None:
    class Own(nn.Conv2d):
        pass

    hooked = nn.Conv2d(2, 2, 3)
    hooked.register_forward_hook(lambda *_: None)
    weight_normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3))
    complex_one = nn.Conv2d(2, 2, 3, dtype=torch.complex64)
    cases = {
        "hooks": hooked,
        "subclass": Own(2, 2, 3),
        "computed from other parameters": weight_normed,
        "complex64": complex_one,
        "not a convolution": nn.Linear(2, 2),
    }
    for word, module in cases.items():
        found = read_conv(module)
        assert isinstance(found, Skip)
        assert word in found.reason


def test_a_spec_reads_like_torch() -> None:
    assert str(SPECS["strided"]) == "Conv2d(6→8, 3×5, stride (2,1), padding (1,2))"
    assert str(SPECS["reflect"]) == "Conv2d(6→5, 3×3, padding 1, reflect)"
    assert math.prod(SPECS["groups"].weight_shape) == 12 * 4 * 9
