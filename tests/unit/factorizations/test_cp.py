"""CP factorizations of kernels."""

from __future__ import annotations

import pytest
import torch

from fxfact.conv import ConvLayer, ConvSpec, compose
from fxfact.errors import ArgumentError
from fxfact.factorizations import CPMobilenet, parse_factorization
from tests.support import apart, random_layer


@pytest.mark.parametrize("name", ["cp_mobilenet", "cp_factorized"])
@pytest.mark.parametrize("groups", [1, 2])
def test_cp_recovers_a_kernel_of_its_rank(name: str, groups: int) -> None:
    spec = ConvSpec.parse(16 * groups, 12 * groups, (3, 3), groups=groups)
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(n, 4, generator=generator) for n in (12 * groups, 16, 3, 3)]
    layer = ConvLayer(spec, torch.einsum("or,ir,ar,br->oiab", *factors))
    chain = parse_factorization(name).decompose(layer, (4,))
    assert apart(layer.weight, compose(chain)) < 1e-3


def test_cp_needs_a_generator_for_a_random_start_and_depends_only_on_it() -> None:
    spec = ConvSpec.parse(6, 8, (3, 3))
    layer, method = random_layer(spec), CPMobilenet(init="random", sweeps=3)
    with pytest.raises(ArgumentError, match="generator"):
        method.decompose(layer, (4,))
    one, again, other = (
        compose(method.decompose(layer, (4,), generator=torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
    )
    assert one.equal(again)
    assert not one.equal(other)


@pytest.mark.parametrize("options", [{"init": "ones"}, {"sweeps": 0}, {"sweeps": "9"}, {"tolerance": -1.0}])
def test_cp_checks_its_options(options: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        CPMobilenet(**options)  # type: ignore[arg-type]
