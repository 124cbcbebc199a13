"""fxfact.explain: why a layer got its factorization and rank, and what else it could have got."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.errors import ArgumentError, ArgumentTypeError, PlanError


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convs = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU()]
        return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 20)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(32, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def test_explanation_compares_the_choice_with_no_dearer_options(network: nn.Module, images: Tensor) -> None:
    plan = fxfact.plan(network, budget=fxfact.Macs(0.5), calibration=images.split(8))
    (decision, *_) = plan.rewrites
    others = [a for a in decision.alternatives if (a.factorization, a.rank) != (decision.factorization, decision.rank)]
    assert len({type(other.factorization) for other in others}) >= 4
    cost = decision.after.macs
    assert cost is not None
    for other in others:
        near = other.factorization == decision.factorization
        assert near or (other.cost.macs is not None and other.cost.macs <= cost)
    increases = [other.predicted_loss_increase for other in decision.alternatives]
    assert increases == sorted(increases)
    text = fxfact.explain(plan, decision.path).table()
    assert decision.factorization is not None
    for words in (
        f"becomes {decision.factorization.name} of rank",
        "chosen",
        "as it is",
        "plan.edited(",
        "loss +, nats",
    ):
        assert words in text


def test_explanation_shows_what_half_of_a_dense_layer_would_cost(network: nn.Module, images: Tensor) -> None:
    plan = fxfact.plan(network, budget=fxfact.Macs(0.95), calibration=images.split(8))
    stays = next(decision for decision in plan if decision.rank is None and decision.alternatives)
    half = 0.5 * (stays.before.macs or 0)
    assert all(other.cost.macs is not None and other.cost.macs <= half for other in stays.alternatives)
    assert "stays as it is" in str(fxfact.explain(plan, stays.path))


@pytest.mark.parametrize("with_data", [True, False])
def test_alternatives_can_be_taken_and_survive_files(
    with_data: bool, network: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    data = {"calibration": images.split(8)} if with_data else {"example_inputs": images}
    plan = fxfact.plan(network, budget=fxfact.Macs(0.5), **data)
    plan.save(tmp_path / "plan.json")
    loaded = fxfact.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    path = plan.rewrites[0].path
    assert str(fxfact.explain(loaded, path)) == str(fxfact.explain(plan, path))
    for other in plan[path].alternatives:
        edited = plan.edited(path, factorization=other.factorization, rank=other.rank)
        assert edited[path].after == other.cost


def test_explanation_of_requested_ranks_and_of_unreadable_layers(network: nn.Module) -> None:
    plan = fxfact.plan(network, "tucker", rank=(4, 4))
    assert "The rank was asked for" in str(fxfact.explain(plan, "2"))
    assert "a matrix: use svd" in str(fxfact.explain(plan, "6"))


@pytest.mark.parametrize("width", [40, 80, 120])
def test_explanation_fits_its_width(width: int, network: nn.Module, images: Tensor) -> None:
    plan = fxfact.plan(network, budget=fxfact.Macs(0.5), calibration=images.split(8))
    text = fxfact.explain(plan, plan.rewrites[0].path).table(width)
    assert max(map(len, text.splitlines())) <= width
    with pytest.raises(ArgumentError, match="width"):
        fxfact.explain(plan, plan.rewrites[0].path).table(3)


def test_explanation_refuses_what_it_cannot_explain(network: nn.Module) -> None:
    plan = fxfact.plan(network)
    with pytest.raises(PlanError, match="no layer at 'nowhere'"):
        fxfact.explain(plan, "nowhere")
    with pytest.raises(ArgumentTypeError, match=r"plan must be a fxfact\.Plan"):
        fxfact.explain(network, "2")  # type: ignore[arg-type]
