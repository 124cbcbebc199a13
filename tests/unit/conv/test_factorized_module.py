"""Convolution modules that were turned into chains in place."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfact.conv import (
    ConvLayer,
    ConvSpec,
    FactorizedModule,
    compose,
    composed_spec,
    factorize_module,
    is_conv,
    run,
    spec_of,
    write_chain,
)
from fxfact.conv.chain import ConvChain
from fxfact.errors import ArgumentError
from tests.support import random_layer


class Shifted(nn.Conv2d):
    """Convolves, then adds one."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv2d(input, self.weight, self.bias, self.stride, self.padding) + 1


class Scaled(nn.Conv2d):
    """Uses its weight for more than a convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.weight.mean()


STAGES = (ConvSpec.parse(4, 3, (1, 1)), ConvSpec.parse(3, 6, (3, 3), padding=1, bias=True))


def swapped(module: nn.Module, specs: tuple[ConvSpec, ...] = STAGES) -> tuple[Any, ConvLayer]:
    chain = ConvChain(tuple(random_layer(spec, torch.float32, seed=k) for k, spec in enumerate(specs)))
    dense = spec_of(module)
    assert composed_spec(specs) == dense
    stages = write_chain(specs, [layer.weight for layer in chain.layers], chain.bias, like=module.weight)
    factorize_module(module, dense, specs, stages)
    return module, ConvLayer(dense, compose(chain), chain.bias)


@pytest.mark.parametrize("kind", [nn.Conv2d, Shifted])
def test_a_factorized_module_runs_its_stages_and_stays_a_convolution(kind: type[nn.Conv2d]) -> None:
    module, whole = swapped(kind(4, 6, 3, padding=1))
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(module(x), run(whole, x) + (1 if kind is Shifted else 0), rtol=1e-4, atol=1e-4)
    assert isinstance(module, kind)
    assert isinstance(module, FactorizedModule)
    assert is_conv(module)
    torch.testing.assert_close(module.weight, whole.weight)
    assert module.bias.equal(whole.bias)
    assert set(module.state_dict()) == {"0.weight", "1.weight", "1.bias"}


@pytest.mark.parametrize("kind", [nn.Conv2d, Shifted])
def test_a_factorized_module_is_copied_and_pickled(kind: type[nn.Conv2d]) -> None:
    module, _ = swapped(kind(4, 6, 3, padding=1))
    x = torch.randn(2, 4, 7, 7)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert type(twin) is type(module)
        assert torch.equal(twin(x), module(x))


def test_another_use_of_the_weight_in_forward_shows_in_the_output() -> None:
    module, _ = swapped(Scaled(4, 6, 3, padding=1))
    assert module(torch.randn(2, 4, 7, 7)).isnan().all()
    assert module.weight.isfinite().all(), "outside of forward it is the composed kernel"


def test_a_factorized_transposed_convolution_returns_the_output_size_that_it_is_called_with() -> None:
    stages = (
        ConvSpec.parse(4, 3, (1, 1)),
        ConvSpec.parse(3, 6, (3, 3), stride=2, transposed=True, bias=True),
    )
    dense = nn.ConvTranspose2d(4, 6, 3, stride=2)
    module, whole = swapped(copy.deepcopy(dense), stages)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(module(x), run(whole, x), rtol=1e-4, atol=1e-4)
    dense.weight, dense.bias = nn.Parameter(module.weight.detach().clone()), nn.Parameter(whole.bias)
    for size in ((12, 12), [2, 6, 11, 12], torch.Size((12, 11)), (11, 11)):
        torch.testing.assert_close(module(x, size), dense(x, size), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module(x[0], output_size=size[-2:]), dense(x[0], size[-2:]), rtol=1e-4, atol=1e-4)
    for size in ((13, 12), (12, 10)):
        with pytest.raises(ValueError, match="requested an output size"):
            module(x, output_size=size)
    plain, _ = swapped(nn.Conv2d(4, 6, 3, padding=1))
    with pytest.raises(ArgumentError, match="only a transposed convolution takes an output_size"):
        plain(x, output_size=(5, 5))
