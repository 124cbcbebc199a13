"""Convolutions with weights, and chains of them."""

from __future__ import annotations

import pytest
import torch

from fxfact.conv import ConvChain, ConvLayer, ConvSpec, compose, composed_spec, run
from fxfact.errors import SpecError
from tests.support import apart, random_input, random_layer


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


def test_tensors_that_do_not_fit_the_spec_are_refused() -> None:
    spec = ConvSpec.parse(4, 6, (3, 3), bias=True)
    with pytest.raises(SpecError, match="weight"):
        ConvLayer(spec, torch.zeros(6, 4, 3), torch.zeros(6))
    with pytest.raises(SpecError, match="bias"):
        ConvLayer(spec, torch.zeros(6, 4, 3, 3))
    with pytest.raises(SpecError, match="bias of"):
        ConvLayer(spec, torch.zeros(6, 4, 3, 3), torch.zeros(5))


def test_stages_that_form_no_chain_are_refused() -> None:
    one = ConvSpec.parse(4, 6, (3, 1))
    for other, words in (
        (ConvSpec.parse(5, 6, (1, 1)), "cannot follow"),
        (ConvSpec.parse(6, 6, (3, 1)), "axis 0"),
        (ConvSpec.parse(6, 6, (1, 1), stride=2), "axis 0"),
        (ConvSpec.parse(6, 6, (1, 1), padding=1), "axis 0"),
    ):
        with pytest.raises(SpecError, match=words):
            chain_of(one, other)
    with pytest.raises(SpecError, match="bias"):
        chain_of(ConvSpec.parse(4, 6, (3, 1), bias=True), ConvSpec.parse(6, 6, (1, 1)))
    with pytest.raises(SpecError, match="at least one"):
        ConvChain(())


def test_the_dilation_of_a_stage_with_kernel_size_1_has_no_effect() -> None:
    chain = chain_of(ConvSpec.parse(4, 6, (1, 1), dilation=3), ConvSpec.parse(6, 5, (3, 3), padding=1))
    whole, x = composed_spec(chain.specs), torch.randn(2, 4, 9, 9, dtype=torch.float64)
    assert whole.dilation == (1, 1)
    torch.testing.assert_close(run(ConvLayer(whole, compose(chain)), x), run(chain, x))
