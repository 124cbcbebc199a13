"""Networks whose layers share stages: the parameters are shared, and stay shared or right through everything after."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.errors import WeightError
from tests.support import EqualLayers, FakeTimer, apart

METHODS = {"tucker": (5, 4), "channel_svd": (5,)}
FRONTENDS = ("trace", "modules", "export")


@pytest.fixture
def layers() -> EqualLayers:
    return EqualLayers().eval()


def jointly(model: nn.Module, image: Tensor, method: str = "tucker", capture: Any = "trace") -> Any:
    given = torch.export.export(model, (image,)) if capture == "export" else model
    rest: dict[str, Any] = {} if capture == "export" else {"example_inputs": image, "capture": capture}
    factorizations = {"heads.*": "svd", "*": method}
    ranks = {"heads.*": 3, "*": METHODS[method]}
    sets = ["convs.*", "heads.*"]
    return fxfact.factorize(given, factorizations, rank=ranks, joint=sets, exclude="stem", verify=True, **rest)


def as_module(network: Any) -> nn.Module:
    return network.module() if isinstance(network, torch.export.ExportedProgram) else network


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("capture", FRONTENDS)
@pytest.mark.parametrize("method", METHODS)
def test_stages_are_shared_parameters(layers: EqualLayers, image: Tensor, method: str, capture: str) -> None:
    network = jointly(layers, image, method, capture)
    plan = fxfact.plan_of(network)
    assert len([d for d in plan if d.shares_with == "convs.0"]) == 3
    assert len([d for d in plan if d.shares_with == "heads.0"]) == 2
    assert count(as_module(network)) == plan.after.params
    assert plan.after.params < plan.network.params


@pytest.mark.parametrize("capture", ["trace", "modules"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("via", ["deepcopy", "pickle", "save", "state_dict"])
def test_sharing_outlives_copies_and_files(
    layers: EqualLayers, image: Tensor, method: str, capture: str, via: str, tmp_path: Path
) -> None:
    network = jointly(layers, image, method, capture)

    def saved() -> nn.Module:
        fxfact.save(network, tmp_path / "network.pt")
        return fxfact.load(tmp_path / "network.pt", layers)

    def filled() -> nn.Module:
        empty = fxfact.apply(fxfact.plan_of(network), layers, weights="empty")
        empty.load_state_dict(network.state_dict())
        return empty

    ways: dict[str, Callable[[], nn.Module]] = {
        "deepcopy": lambda: copy.deepcopy(network),
        "pickle": lambda: pickle.loads(pickle.dumps(network)),
        "save": saved,
        "state_dict": filled,
    }
    other = ways[via]()
    assert count(other) == count(network) == fxfact.plan_of(network).after.params
    torch.testing.assert_close(other(image), network(image))


def test_exported_program_with_shared_stages_is_saved(layers: EqualLayers, image: Tensor, tmp_path: Path) -> None:
    program = jointly(layers, image, capture="export")
    fxfact.save(program, tmp_path / "network.pt2")
    again = torch.export.load(tmp_path / "network.pt2").module()
    memory = {each.data_ptr(): each.numel() for each in again.parameters()}
    assert sum(memory.values()) == count(program.module())
    torch.testing.assert_close(again(image), program.module()(image))


def test_training_keeps_stages_equal(layers: EqualLayers, image: Tensor) -> None:
    network = jointly(layers, image).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(image).square().sum().backward()
    optimizer.step()
    stages = [network.get_submodule(f"convs.{k}.0").weight for k in range(3)]
    assert stages[0] is stages[1] is stages[2]
    own = [network.get_submodule(f"convs.{k}.1").weight for k in range(3)]
    assert not torch.equal(own[0], own[1])


def test_decomposition_does_not_depend_on_the_executor(layers: EqualLayers, image: Tensor) -> None:
    plan = fxfact.plan_of(jointly(layers, image))
    with ThreadPoolExecutor(2) as executor:
        threaded = fxfact.apply(plan, layers, executor=executor)
    assert torch.equal(threaded(image), fxfact.apply(plan, layers)(image))


@pytest.mark.parametrize("method", METHODS)
def test_folding_norms_changes_no_output(layers: EqualLayers, image: Tensor, method: str) -> None:
    """A norm after a shared last stage gives its layer a last stage of its own."""
    network = jointly(layers, image, method)
    fast = fxfact.for_inference(network, image, timer=FakeTimer())
    torch.testing.assert_close(fast(image), network(image), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    torch.testing.assert_close(network(image), jointly(layers, image, method)(image))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_share_stages(layers: EqualLayers, image: Tensor, dtype: torch.dtype) -> None:
    half = copy.deepcopy(layers).to(dtype)
    network = fxfact.factorize(half, rank=(5, 4), example_inputs=image.to(dtype), joint="convs.*", include="convs.*")
    assert count(network) == fxfact.plan_of(network).after.params
    exact = fxfact.factorize(layers, rank=(5, 4), example_inputs=image, joint="convs.*", include="convs.*")
    assert apart(exact(image), network(image.to(dtype)).float()) < 0.1


@pytest.mark.parametrize("capture", ["trace", "modules"])
@pytest.mark.parametrize("method", METHODS)
def test_refit_leaves_shared_stages_alone(layers: EqualLayers, image: Tensor, method: str, capture: str) -> None:
    batches = [image + k for k in range(4)]
    network = jointly(layers, image, method, capture)
    refitted, result = fxfact.refit(network, layers, batches, likelihood="gaussian")
    shared_last = {"tucker": {"convs.0", "convs.1", "convs.2"}, "channel_svd": set[str]()}[method]
    assert not shared_last & {*result.paths}
    assert count(refitted) == count(network)
    names = [name for name, _ in network.named_parameters() if name.startswith("convs") and name.endswith("0.weight")]
    states = network.state_dict(), refitted.state_dict()
    assert names
    assert all(torch.equal(states[0][name], states[1][name]) for name in names)


def test_distillation_keeps_sharing(layers: EqualLayers, image: Tensor) -> None:
    network = jointly(layers, image)
    trained, _ = fxfact.distill(network, layers, [image + k for k in range(4)], steps=2, likelihood="gaussian")
    assert count(trained) == count(network)


def test_layer_refuses_a_write_that_would_change_the_others(layers: EqualLayers, image: Tensor) -> None:
    network = jointly(layers, image, capture="modules")
    before = network(image)
    for write in (
        lambda: network.convs[1].weight.data.mul_(2),
        lambda: network.convs[1].weight.data.mul_(torch.arange(1.0, 9.0).reshape(-1, 1, 1, 1)),
    ):
        with torch.no_grad(), pytest.raises(WeightError, match="the other layers of its joint set hold the weight of"):
            write()
    assert torch.equal(network(image), before)
    scaled = copy.deepcopy(network)
    scaled.convs[1].weight = nn.Parameter(2 * scaled.convs[1].weight.detach())  # gives it stages of its own
    ones = image.new_ones(1, 8, 5, 5)
    assert torch.equal(scaled.convs[0](ones), network.convs[0](ones))
    assert apart(2 * network.convs[1].weight, scaled.convs[1].weight) < 1e-5
    with torch.no_grad():
        scaled.convs[1].weight.data.mul_(2)
    assert apart(4 * network.convs[1].weight, scaled.convs[1].weight) < 1e-5


def test_first_output_scaling_is_taken_where_the_last_stage_is_its_own(layers: EqualLayers, image: Tensor) -> None:
    network = jointly(layers, image, "channel_svd", capture="modules")
    kernels = [conv.weight.detach().clone() for conv in network.convs]
    with torch.no_grad():
        network.convs[1].weight.data.mul_(torch.arange(1.0, 9.0).reshape(-1, 1, 1, 1))
    assert apart(kernels[0], network.convs[0].weight) == 0
    assert apart(kernels[1] * torch.arange(1.0, 9.0).reshape(-1, 1, 1, 1), network.convs[1].weight) < 1e-5


@pytest.mark.parametrize("capture", ["trace", "modules"])
def test_layers_become_dense_alone(layers: EqualLayers, image: Tensor, capture: str) -> None:
    network = jointly(layers, image, capture=capture)
    if capture == "modules":
        dense = network.convs[1].to_conv()
        torch.testing.assert_close(dense.weight, network.convs[1].weight.as_subclass(Tensor))
        assert "_shared_names" not in vars(dense)
    inspected = fxfact.inspect(network, original=layers)
    errors = [row.relative_error for row in inspected.rows if row.path.startswith("convs")]
    assert all(error is not None and 0 < error < 1 for error in errors)


def test_reports_and_differences_show_sets(layers: EqualLayers, image: Tensor, tmp_path: Path) -> None:
    network = jointly(layers, image)
    report = fxfact.report(layers, network, image)
    notes = {conv.path: conv.note for conv in report.convolutions}
    assert notes["convs.0"] == "its joint set shares 2 stages"
    assert notes["convs.2"] == "shares 2 stages with convs.0"
    assert "shares 2 stages with convs.0" in report.to_html()
    assert sum(conv.after.params for conv in report.convolutions) + 48 == report.after.params == count(network)
    difference = fxfact.diff(layers, network).table()
    assert "Conv2d(8→4, 1×1), the weight of convs.0.0" in difference
    assert difference.count("the weight of heads.0.0") == 1
    rows = {row.path: row for row in fxfact.inspect(network, example_inputs=image).rows}
    assert rows["convs.1"].remark == "shares the weight of convs.0.0, convs.0.2"
    assert rows["convs.0"].remark == ""
    assert sum(row.cost.params for row in rows.values()) + 48 == count(network)


def test_a_factorized_network_is_factorized_again(layers: EqualLayers, image: Tensor) -> None:
    """Shared stages then are layers with one weight."""
    network = jointly(layers, image)
    again = fxfact.plan(network, ["tucker", "svd"], rank=0.5, example_inputs=image)
    assert again.network.params == count(network)
    assert again["convs.2.0"].tied_to == "convs.0.0"
    assert count(fxfact.apply(again, network)) == again.after.params


def test_queries_keys_and_values_share_what_they_read() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    split = fxfact.nn.split_attention(encoder)
    network = fxfact.factorize(split, "svd", rank=8, joint="self_attn.[qkv]_proj", example_inputs=x, verify=True)
    plan = fxfact.plan_of(network)
    assert [d.path for d in plan if d.shares_with] == [f"self_attn.{name}_proj" for name in "qkv"]
    assert count(network) == plan.after.params
    alone = fxfact.factorize(split, "svd", rank=8, example_inputs=x)
    assert count(alone) - count(network) == 2 * 32 * 8
