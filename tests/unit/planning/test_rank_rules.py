"""Rank rules: energy, VBMF, and the largest rank that pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxfact
from fxfact.conv import ConvLayer, ConvSpec
from fxfact.errors import ArgumentTypeError, RankError
from fxfact.factorizations import SVD, CPMobilenet, Factorization
from fxfact.planning.rank_rules import VBMF, Energy, LargestThatPays, RankRule, vbmf_rank
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
    assert Energy(1.0).rank_for(SVD(), candidate) == (4,)


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


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Conv2d(64, 64, 3), "tucker"),
        (nn.Conv1d(48, 48, 5), "channel_svd"),
        (nn.Conv3d(16, 24, 3), "tucker"),
        (nn.ConvTranspose2d(48, 48, 3), "tucker"),
        (nn.Conv2d(64, 64, 1), "svd"),
        (nn.Conv2d(64, 64, 3, groups=2), "channel_svd"),
        (nn.Conv2d(32, 32, 5), "spatial_svd"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value),
)
def test_vbmf_of_noise_leaves_the_convolution_dense(layer: nn.Module, name: str) -> None:
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    (decision,) = fxfact.plan(nn.Sequential(layer).eval(), name, rank=VBMF())
    assert decision.rank is None
    assert f"VBMF takes the kernel for noise alone: {name} rank 0" in decision.reason


def test_vbmf_tries_the_next_factorization_of_a_list_and_gives_every_reason() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3))
    nn.init.zeros_(model[0].weight)
    (decision,) = fxfact.plan(model, ["channel_svd", "tucker", "cp"], rank=VBMF())
    reasons = decision.reason.split("; ")
    assert [reason.partition(":")[0] for reason in reasons[:2]] == ["VBMF takes the kernel for noise alone"] * 2
    assert "cp_mobilenet has no such rank" in reasons[2]


class Answers(RankRule):
    """A rule of a third party, which returns one answer for every convolution."""

    def __init__(self, answer: object) -> None:
        self.answer: Any = answer

    def rank_for(self, factorization: Factorization, candidate: Candidate) -> Any:
        return self.answer


@pytest.mark.parametrize("answer", [None, 0, (0, 3), [3, 0], torch.tensor(0)])
def test_rule_that_finds_no_rank_leaves_the_convolution_dense(model: nn.Module, answer: object) -> None:
    plan = fxfact.plan(model, "tucker", rank=Answers(answer))
    assert not plan.rewrites
    assert plan["first"].reason.startswith("Answers finds no rank for tucker, it returned ")


@pytest.mark.parametrize(("answer", "rank"), [((4, 2), (4, 2)), ([4, 2], (4, 2)), (2, (2, 2)), (0.5, None)])
def test_rule_may_return_what_rank_takes(model: nn.Module, answer: object, rank: object) -> None:
    plan = fxfact.plan(model, "tucker", rank={"first": Answers(answer), "*": 0.5})
    assert plan["first"].rank == (rank or fxfact.plan(model, "tucker", rank=0.5)["first"].rank)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (-1, RankError, r"first: the rank that Answers returned: a rank must be positive"),
        ((3,), RankError, "first: the rank that Answers returned: tucker has 2 ranks"),
        (b"3", ArgumentTypeError, "first: the rank that Answers returned: a rank cannot be a bytes"),
        ((99, 2), RankError, "first: tucker rank must be within"),
    ],
)
def test_rule_whose_answer_cannot_be_a_rank_is_named(
    model: nn.Module, answer: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        fxfact.plan(model, "tucker", rank=Answers(answer))
