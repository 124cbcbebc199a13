"""Joint sets: which layers may share stages, plans that let them, and what plans and messages say about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.errors import ArgumentError, ArgumentTypeError, BudgetError, PlanError
from fxfact.planning import Plan
from tests.support import EqualLayers

IMAGE = torch.zeros(1, 4, 10, 10)


def paths_of_sets(plan: Plan) -> dict[str, list[str]]:
    """The paths of every joint set, by its first layer."""
    sets: dict[str, list[str]] = {}
    for decision in plan:
        if decision.shares_with is not None:
            sets.setdefault(decision.shares_with, []).append(decision.path)
    return sets


@pytest.mark.parametrize("request_", ["convs.*", ["convs.*"], ("convs.*",), {"convs.*"}, ["convs.*", "convs.*"]])
def test_layers_at_a_glob_share_stages(layers: EqualLayers, image: Tensor, request_: Any) -> None:
    plan = fxfact.plan(layers, "tucker", rank=(4, 5), example_inputs=image, joint=request_)
    assert paths_of_sets(plan) == {"convs.0": ["convs.0", "convs.1", "convs.2"]}
    assert plan["convs.0"].shared_stages == plan["convs.2"].shared_stages == (0, 2)


def test_every_glob_names_a_set(layers: EqualLayers, image: Tensor) -> None:
    globs = ["heads.*", "convs.[01]"]
    plan = fxfact.plan(layers, ["tucker", "svd"], rank=4, example_inputs=image, joint=globs)
    assert paths_of_sets(plan) == {"convs.0": ["convs.0", "convs.1"], "heads.0": ["heads.0", "heads.1"]}
    assert plan["convs.2"].shares_with is None


def test_layers_left_out_of_the_plan_are_left_out_of_their_set(layers: EqualLayers, image: Tensor) -> None:
    for scope in ({"exclude": "convs.0"}, {"include": ["convs.1", "convs.2"]}):
        plan = fxfact.plan(layers, rank=4, example_inputs=image, joint="convs.*", **scope)
        assert paths_of_sets(plan) == {"convs.1": ["convs.1", "convs.2"]}


def test_plan_counts_shared_parameters_once(layers: EqualLayers, image: Tensor) -> None:
    together, apart = (
        fxfact.plan(layers, "tucker", rank=(4, 5), include="convs.*", example_inputs=image, joint=sets)
        for sets in ("convs.*", ())
    )
    assert apart.after.params - together.after.params == 2 * (8 * 5 + 4 * 8)  # both pointwise stages, of two layers
    assert together.after.macs == apart.after.macs
    network = fxfact.apply(together, layers)
    assert sum(p.numel() for p in network.parameters()) == together.after.params


@pytest.mark.parametrize(
    ("joint_", "message"),
    [
        ("stem", "'stem' fits one layer that may be rewritten, and a joint set needs two. stem fits alone"),
        ("nowhere", r"'nowhere' fits no layer .* There are: stem, "),
        ("left.*", r"'left\.\*' fits one layer .* left\.0 fits alone; left\.1 stays dense: excluded"),
        ("[sc]*", r"stem with a weight \(8, 4, 3, 3\) in float32 on cpu and convs\.0 with a weight \(8, 8, 3, 3\)"),
        ("grouped.*", r"grouped\.0, Conv2d\(8→8, 3×3, groups 2\)\. Layers with groups and transposed ones share no"),
        ("up.*", r"up\.0, ConvTranspose2d\(8→8, 3×3\)\. Layers with groups and transposed ones share no stages"),
        ("tied.*", r"'tied\.\*' fits layers that hold the whole weight of tied\.0\. Leave them out"),
        (["tied.1", "convs.*"], r"'tied\.1' fits layers that hold the whole weight of tied\.0"),
        (["convs.*", "convs.[12]"], r"convs\.1 fits 'convs\.\*' and 'convs\.\[12\]'\. A layer belongs to one set"),
    ],
)
def test_sets_that_cannot_share_stages_are_refused(image: Tensor, joint_: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        fxfact.plan(EqualLayers(others=True).eval(), rank=4, example_inputs=image, exclude="left.1", joint=joint_)


def test_layers_of_other_dtypes_are_refused(layers: EqualLayers) -> None:
    layers.convs[1].half()
    with pytest.raises(ArgumentError, match=r"convs\.1 with a weight \(8, 8, 3, 3\) in float16 on cpu"):
        fxfact.plan(layers, rank=4, joint="convs.*")


@pytest.mark.parametrize("joint_", [3, None, [3], {"convs.*": 1}, lambda path, spec: True])
def test_other_types_are_refused(layers: EqualLayers, joint_: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="joint must be a glob on paths or a list of globs"):
        fxfact.plan(layers, rank=4, joint=joint_)


@pytest.mark.parametrize(
    ("factorization", "rank", "note"),
    [
        ("cp", 4, "not joint: cp_mobilenet of this rank has no stages to share"),
        ("tucker", {"convs.1": 3, "*": 4}, "not joint: convs.1 gets tucker of rank (3, 3), and convs.0 tucker of rank"),
        ("tucker", {"convs.1": 4}, "not joint: the other layers of the set stay dense"),
    ],
)
def test_note_says_why_fixed_ranks_are_not_shared(
    layers: EqualLayers, image: Tensor, factorization: str, rank: Any, note: str
) -> None:
    plan = fxfact.plan(layers, factorization, rank=rank, example_inputs=image, joint="convs.*")
    assert not paths_of_sets(plan)
    assert note in plan["convs.1"].note
    assert note in str(plan).replace("\n", " ") or note[:20] in str(plan)


def test_set_may_grow_in_one_layer_but_not_altogether(layers: EqualLayers) -> None:
    plan = fxfact.plan(layers, "channel_svd", rank=8, joint="convs.*", include="convs.*")
    assert plan["convs.0"].after.params > plan["convs.0"].before.params  # it counts what the others share
    assert plan.after.params < plan.network.params
    assert len(paths_of_sets(plan)["convs.0"]) == 3
    alone = fxfact.plan(layers, "channel_svd", rank=8, include="convs.*")
    assert "it would grow" in alone["convs.0"].reason
    assert not alone.rewrites
    grown = fxfact.plan(layers, "channel_svd", rank=8, joint="convs.*", include="convs.*", example_inputs=IMAGE)
    assert not paths_of_sets(grown)  # in MACs
    assert "MACs" in grown["convs.1"].reason


def test_plan_shows_what_is_shared(layers: EqualLayers, image: Tensor) -> None:
    plan = fxfact.plan(layers, "tucker", rank=4, example_inputs=image, joint="convs.*")
    table = plan.table(200)
    assert "its joint set shares 2 stages" in table
    assert table.count("shares 2 stages with convs.0") == 2
    assert "convs.0, convs.1, convs.2 hold the same parameters in stage 1 and stage 3" in str(
        fxfact.explain(plan, "convs.1")
    ).replace("\n  ", " ")


def test_plan_with_a_set_is_saved_and_read(layers: EqualLayers, image: Tensor, tmp_path: Path) -> None:
    plan = fxfact.plan(layers, "tucker", rank=4, example_inputs=image, joint={"convs.*"})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.call["joint"] == ["convs.*"]


def test_edits_hold_for_the_whole_set(layers: EqualLayers, image: Tensor) -> None:
    plan = fxfact.plan(layers, "tucker", rank=4, example_inputs=image, joint="convs.*")
    edited = plan.edited("convs.1", rank=(3, 2))
    assert {edited[path].rank for path in ("convs.0", "convs.1", "convs.2")} == {(3, 2)}
    assert paths_of_sets(edited) == paths_of_sets(plan)
    for changes in ({"factorization": "cp", "rank": 4}, {"skip": "as it is"}):
        changed = plan.edited("convs.2", **changes)
        assert not paths_of_sets(changed)
        assert len({changed[path].factorization for path in ("convs.0", "convs.1", "convs.2")}) == 1
    assert paths_of_sets(plan.edited("stem", rank=2)) == paths_of_sets(plan)
    fxfact.apply(edited, layers)


def test_plan_whose_layers_cannot_share_is_damaged(layers: EqualLayers, image: Tensor) -> None:
    plan = fxfact.plan(layers, "tucker", rank=4, example_inputs=image, joint="convs.*")
    for path, changes in (
        ("convs.1", {"rank": (3, 4)}),
        ("convs.0", {"shares_with": None}),
        ("convs.1", {"shares_with": "stem"}),
        ("stem", {"shares_with": "convs.0"}),
    ):
        decisions = [replace(each, **changes) if each.path == path else each for each in plan]
        with pytest.raises(PlanError, match="cannot share stages with"):
            replace(plan, decisions=tuple(decisions))
    with pytest.raises(PlanError, match=r"convs\.0: there are no stages to share"):
        replace(plan["convs.0"], factorization=None, rank=None)


@pytest.fixture
def layers() -> EqualLayers:
    return EqualLayers().eval()


def similar(layers: EqualLayers) -> EqualLayers:
    """Layers whose kernels are nearly equal, so that sharing pays."""
    generator = torch.Generator().manual_seed(3)
    for conv in layers.convs:
        noise = 0.05 * torch.randn(conv.weight.shape, generator=generator)
        conv.weight = nn.Parameter(layers.convs[0].weight.detach() + 0.1 * noise)
    return layers


@pytest.mark.parametrize("with_data", [False, True])
def test_budget_of_parameters_lets_similar_layers_share(layers: EqualLayers, image: Tensor, with_data: bool) -> None:
    similar(layers)
    data: dict[str, Any] = {"calibration": [image] * 3, "likelihood": "gaussian"} if with_data else {}
    budget = fxfact.Params(0.4)
    plan = fxfact.plan(layers, budget=budget, example_inputs=image, joint="convs.*", **data)
    alone = fxfact.plan(layers, budget=budget, example_inputs=image, **data)
    assert paths_of_sets(plan) == {"convs.0": ["convs.0", "convs.1", "convs.2"]}
    assert plan.after.params <= 0.4 * plan.network.params
    if with_data:
        assert (plan.predicted_loss_increase or 0) < (alone.predicted_loss_increase or 0)
    options = plan["convs.1"].alternatives
    assert (plan["convs.1"].factorization, plan["convs.1"].rank) in [(a.factorization, a.rank) for a in options]
    assert options[0].cost.params <= 8 * 8 * 9
    network = fxfact.apply(
        plan, layers, **({"calibration": [image] * 3, "likelihood": "gaussian"} if with_data else {})
    )
    assert sum(p.numel() for p in network.parameters()) == plan.after.params


@pytest.mark.parametrize("budget", [fxfact.Macs(0.5), fxfact.Params(0.95)], ids=str)
def test_budget_does_not_share_where_it_does_not_pay(layers: EqualLayers, image: Tensor, budget: Any) -> None:
    plan = fxfact.plan(layers, budget=budget, example_inputs=image, joint="convs.*")
    alone = fxfact.plan(layers, budget=budget, example_inputs=image)
    assert plan.decisions == alone.decisions
    assert "joint: no set shares stages, because chains of their own lose less within this budget" in str(plan)
    assert "joint" not in str(alone)


def test_smallest_budget_may_need_shared_stages(layers: EqualLayers, image: Tensor) -> None:
    """Sharing reaches numbers of parameters that separate chains do not."""
    arguments: dict[str, Any] = {"include": "convs.*", "example_inputs": image}
    least = []
    for sets in ((), "convs.*"):
        with pytest.raises(BudgetError) as caught:
            fxfact.plan(layers, "tucker", budget=fxfact.Params(at_most=500), joint=sets, **arguments)
        least.append(int(caught.value.least or 0))
    assert least[1] == least[0] - 2 * (8 + 8)
    plan = fxfact.plan(layers, "tucker", budget=fxfact.Params(at_most=least[1]), joint="convs.*", **arguments)
    assert paths_of_sets(plan)
    assert plan.after.params == least[1]


def test_multiples_hold_for_shared_stages(layers: EqualLayers, image: Tensor) -> None:
    similar(layers)
    budget = fxfact.Params(0.5)
    plan = fxfact.plan(layers, "tucker", budget=budget, example_inputs=image, joint="convs.*", multiple_of=4)
    assert paths_of_sets(plan)
    assert all(r % 4 == 0 for r in plan["convs.0"].rank or ())


def test_budget_of_milliseconds_refuses_sets(layers: EqualLayers, image: Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"save parameters, but no time\. Pass a budget of parameters"):
        fxfact.plan(layers, budget=fxfact.Latency(0.5), example_inputs=image, joint="convs.*")


def test_curves_of_sets_are_kept(layers: EqualLayers, image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = fxfact.ErrorCurveCache()
    arguments: dict[str, Any] = {"budget": fxfact.Params(0.5), "example_inputs": image, "error_curves": curves}
    first = fxfact.plan(layers, joint="convs.*", **arguments)
    count = len(curves)
    fails = pytest.fail  # nothing is computed again
    monkeypatch.setattr("fxfact.planning.joint_options.joint_error_curves", lambda *args: fails("computed again"))
    assert fxfact.plan(layers, joint="convs.*", **arguments) == first
    assert len(curves) == count
    monkeypatch.undo()
    fxfact.plan(layers, joint="convs.[01]", **arguments)
    assert len(curves) > count  # another set is not the same
