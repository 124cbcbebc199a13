"""Chains in place of convolutions: names, meta, sharing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxfact
from fxfact.capture import capture
from fxfact.graph import match, splice
from tests.support import Small, apart


def test_splice_replaces_a_call_by_keywords(image: Tensor) -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(weight=self.kernel, padding=1, input=torch.relu(self.conv(input=x)))

    result = fxfact.factorize(Keywords(), "tt", rank=10**6, allow_growth=True, example_inputs=image, verify=True)
    assert len(fxfact.plan_of(result).rewrites) == 2


def test_splice_installs_the_stages_under_the_path_of_the_site(small: Small) -> None:
    result = fxfact.factorize(small)
    assert [n for n in dict(result.named_parameters()) if "second" in n] == [f"second.{k}.weight" for k in range(3)]
    targets = [node.target for node in result.graph.nodes if node.op == "call_module"]
    assert targets[:4] == ["first.0", "first.1", "first.2", "norm"]


def test_splice_keeps_meta_and_records_the_node_that_it_replaces(small: Small, image: Tensor) -> None:
    traced = capture(small, image).network
    before = next(node for node in traced.graph.nodes if node.target == "second")
    result = fxfact.factorize(small, example_inputs=image)
    stages = [node for node in result.graph.nodes if str(node.target).startswith("second.")]
    assert len(stages) == 3
    for node in stages:
        assert node.meta["nn_module_stack"] == before.meta["nn_module_stack"]
        assert "support.py" in node.meta["stack_trace"]
        (source,) = node.meta["from_node"]
        assert (source.name, source.pass_name) == ("second", "fxfact.FactorizeConvs")
    assert stages[-1].meta["tensor_meta"].shape == before.meta["tensor_meta"].shape


def test_splice_shares_the_stages_of_a_convolution_that_is_called_twice(image: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.relu(self.conv(x)))

    model = Twice()
    result = fxfact.factorize(model, "tt", rank=10**6, allow_growth=True, example_inputs=image)
    assert sum(node.op == "call_module" for node in result.graph.nodes) == 8
    assert len(list(result.parameters())) == 5
    assert apart(model(image), result(image)) < 1e-5
    assert fxfact.plan_of(result)["conv"].before.macs == 2 * 4 * 4 * 9 * 100


def test_splice_shares_the_stages_of_convolutions_with_one_weight(image: Tensor) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(4, 4, 3, padding=1)
            self.other = nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False)
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(torch.relu(self.one(x)))

    model = Tied()
    result = fxfact.factorize(model, "tt", rank=0.9, example_inputs=image, verify=True)
    assert [d.tied_to for d in fxfact.plan_of(result)] == [None, "one"]
    for k in range(4):
        assert result.get_submodule(f"one.{k}").weight is result.get_submodule(f"other.{k}").weight
    assert result.get_submodule("other.1").dilation == (2, 1)
    assert fxfact.plan_of(result).after.params == sum(p.numel() for p in result.parameters())
    assert fxfact.plan(model, exclude="other").rewrites == ()
    empty = fxfact.apply(fxfact.plan_of(result), model, weights="empty")
    empty.load_state_dict(result.state_dict())
    assert empty.get_submodule("one.1").weight is empty.get_submodule("other.1").weight
    assert empty(image).equal(result(image))


def test_splice_makes_no_trainable_parameter_of_a_buffer(image: Tensor) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.randn(8, 4, 3, 3))
            self.register_buffer("shift", torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel, self.shift)

    result = fxfact.factorize(Fixed(), example_inputs=image)
    assert fxfact.plan_of(result).network.params == 8 * 36 + 8
    assert not any(p.requires_grad for p in result.parameters())


def test_splice_keeps_training_modes_and_requires_grad(small: Small) -> None:
    small.train()
    small.norm.eval()
    small.second.weight.requires_grad_(False)
    result = fxfact.factorize(small)
    modes = {name: module.training for name, module in result.named_modules()}
    assert modes.pop("norm") is False
    assert all(modes.values())
    assert not any(p.requires_grad for name, p in result.named_parameters() if name.startswith("second."))
    assert all(p.requires_grad for name, p in result.named_parameters() if name.startswith("first."))


def test_splice_works_on_a_graph_that_was_spliced_before(small: Small, image: Tensor) -> None:
    once = fxfact.factorize(small, "tucker", rank=0.6)
    twice = fxfact.factorize(once, "spatial_svd", include="*.1", allow_growth=True, example_inputs=image, verify=True)
    assert {d.path for d in fxfact.plan_of(twice).rewrites} == {"first.1", "second.1"}
    assert twice(image).shape == once(image).shape
    (source,) = next(n for n in twice.graph.nodes if n.target == "second.1.0").meta["from_node"]
    assert [earlier.name for earlier in source.from_node] == ["second"]


def test_splice_returns_the_convolutions_among_the_stages(image: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.relu(self.conv(x)))

    traced = fx.symbolic_trace(Twice())
    (site,) = match(traced).sites
    stages = [nn.ConstantPad2d(1, 0.0), nn.Conv2d(4, 2, (3, 1)), nn.Conv2d(2, 4, (1, 3))]
    made = splice(traced, site, stages, pass_name="test")
    traced.recompile()
    assert [stage.path for stage in made] == ["conv.1", "conv.2"]
    found = match(traced).sites
    for one, other in zip(made, found, strict=True):
        assert (one.path, one.spec, one.nodes) == (other.path, other.spec, other.nodes)
        assert one.weight is other.weight
        assert one.bias is other.bias
    assert traced(image).shape == image.shape
