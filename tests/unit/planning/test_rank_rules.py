"""Rank rules: energy, VBMF, and the largest rank that pays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxfact
from fxfact.conv import ConvLayer, ConvSpec
from fxfact.factorizations import CPMobilenet, PointwiseSVD
from fxfact.planning.rank_rules import VBMF, Energy, LargestThatPays, vbmf_rank
from fxfact.planning.strategy import Candidate


def test_energy_keeps_more_ranks_for_more_energy(model: nn.Module) -> None:
    ranks = [sum(sum(d.rank) for d in fxfact.plan(model, "tucker", rank=Energy(s)).rewrites) for s in (0.3, 0.6)]
    assert 0 < ranks[0] < ranks[1]


@pytest.mark.parametrize("method", [CPMobilenet(), CPMobilenet(init="random")], ids=["svd", "random"])
def test_energy_chooses_ranks_for_cp(model: nn.Module, method: CPMobilenet) -> None:
    assert fxfact.plan(model, method, rank=Energy(0.5)).rewrites


def test_energy_of_all_is_the_rank_that_keeps_it() -> None:
    spec = ConvSpec.parse(16, 16, (1, 1))
    random = torch.Generator().manual_seed(0)
    weight = (torch.randn(16, 4, generator=random) @ torch.randn(4, 16, generator=random))[..., None, None]
    candidate = Candidate("conv", ConvLayer(spec, weight), ((spec, None),))
    assert Energy(1.0).rank_for(PointwiseSVD(), candidate) == (4,)


def test_largest_rank_that_pays_is_the_largest(model: nn.Module) -> None:
    for decision in fxfact.plan(model, "channel_svd", rank=LargestThatPays()).rewrites:
        assert not decision.after.exceeds(decision.before)
        (rank,) = decision.rank
        larger = decision.factorization.layout(decision.spec, (rank + 1,))
        assert sum(stage.params for stage in larger) >= decision.before.params


def test_vbmf_finds_the_rank_under_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(60, 5, generator=generator), torch.randn(5, 200, generator=generator)
    assert vbmf_rank(left @ right + 0.3 * torch.randn(60, 200, generator=generator)) == 5
    assert vbmf_rank(torch.randn(60, 200, generator=generator)) <= 1


def test_vbmf_does_not_apply_to_cp(model: nn.Module) -> None:
    assert "VBMF finds ranks of matrices" in fxfact.plan(model, "cp", rank=VBMF())["first"].reason
