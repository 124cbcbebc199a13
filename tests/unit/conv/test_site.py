"""Sites of convolutions in a network."""

from __future__ import annotations

import torch
from torch import Tensor

from fxfact.conv import ConvSite, ConvSpec, Skip, mark_tied, path_of
from tests.support import random_layer

SPEC = ConvSpec.parse(4, 6, (3, 3), bias=True)


def site_of(path: str, weight: Tensor, spec: ConvSpec = SPEC, **shapes: tuple[tuple[int, ...], ...]) -> ConvSite:
    bias = torch.randn(spec.out_channels, requires_grad=True) if spec.bias else None
    return ConvSite(path=path, spec=spec, weight=weight, bias=bias, **shapes)  # type: ignore[arg-type]


def test_the_layer_of_a_site_has_detached_tensors_in_our_layout() -> None:
    spec = ConvSpec.parse(4, 6, (3, 3), transposed=True, bias=True)
    weight = torch.randn(4, 6, 3, 3, requires_grad=True)
    site = site_of("up", weight, spec)
    assert site.layer.weight.equal(weight.transpose(0, 1))
    assert site.layer.bias is not None
    assert not site.layer.weight.requires_grad
    assert not site.layer.bias.requires_grad


def test_input_sizes_are_counted_once_per_sample() -> None:
    weight = random_layer(SPEC).weight
    site = site_of("conv", weight, input_shapes=((8, 4, 9, 7), (4, 5, 5)))
    assert site.input_sizes() == (*[(9, 7)] * 8, (5, 5)), "an input without a batch is one sample"
    assert site.input_sizes(4) == ((9, 7), (9, 7), (5, 5)), "a call on two crops of each sample"
    assert site_of("conv", weight).input_sizes() is None


def test_sites_with_the_weight_of_an_earlier_one_are_tied_to_it() -> None:
    shared, other = random_layer(SPEC).weight, random_layer(SPEC).weight
    sites = [site_of("a", shared), site_of("b", other), site_of("c", shared), site_of("d", shared)]
    marked = mark_tied(sites)
    assert [site.tied_to for site in marked] == [None, None, "a", "a"]
    assert marked[0] is sites[0]
    assert [path_of(item) for item in (*marked, Skip("no reason", "e"))] == ["a", "b", "c", "d", "e"]
