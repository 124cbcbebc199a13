"""Capture, match, splice and the pass: what they find, what they leave alone, and what they keep."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.infra.pass_manager import PassManager
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import prune

import fxfact
from fxfact.capture import capture
from fxfact.conv import ConvSite, Skip, path_of
from fxfact.errors import CaptureError, GraphError, PlanError
from fxfact.graph import check_invariants, match
from fxfact.passes import FactorizeConvs
from tests.support import Small, apart


def verdicts(model: nn.Module) -> dict[str, ConvSite | Skip]:
    return {path_of(item): item for item in capture(model, how="trace").found}


class Scaled(nn.Conv2d):
    """A subclass that computes its weight, as weight standardisation does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * 2, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Plainly(nn.Conv2d):
    """A subclass whose forward is the convolution itself."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias)


class Zoo(nn.Module):
    """A convolution of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Conv2d(8, 8, 3, padding=1)
        self.subclass = Plainly(8, 8, 3, padding=1)
        self.scaled = Scaled(8, 8, 3, padding=1)
        self.hooked = nn.Conv2d(8, 8, 3, padding=1)
        self.hooked.register_forward_pre_hook(lambda module, args: None)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.transposed = nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.read = nn.Conv2d(8, 8, 3, padding=1)
        self.never = nn.Conv2d(8, 8, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3) / 9)
        self.register_buffer("constant", torch.randn(8, 8, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transposed(self.hooked(self.scaled(self.subclass(self.module(x)))))
        x = self.read(self.normed(x)) * self.read.weight.mean()
        x = torch.conv2d(x, self.kernel, padding="same")
        x = F.conv2d(input=x, weight=self.constant, padding=1)
        x = F.conv_transpose2d(x, self.kernel, padding=1)
        return F.conv2d(x, x.mean((0, 2, 3)).reshape(1, 8, 1, 1))


def test_every_convolution_is_found_or_listed_with_its_reason() -> None:
    found = verdicts(Zoo())
    reasons = {path: item.reason for path, item in found.items() if isinstance(item, Skip)}
    sites = {path for path, item in found.items() if isinstance(item, ConvSite)}
    assert sites == {"module", "subclass", "transposed", "constant"}
    expected = {
        "scaled": None,  # traced through: its call is functional, on a computed weight
        "hooked": "hooks",
        "normed": "computed from other parameters",
        "read": "weight or bias is also read by mean",
        "never": "does not call",
        "kernel": "used by calls with different settings",
    }
    for path, word in expected.items():
        if word is not None:
            assert word in reasons.pop(path)
    assert len(reasons) == 2
    assert all("computed in the graph" in reason for reason in reasons.values())


def test_a_call_by_keywords_is_spliced_at_its_input(image: Tensor) -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(weight=self.kernel, padding=1, input=torch.relu(self.conv(input=x)))

    result = fxfact.factorize(Keywords(), "tt", rank=10**6, allow_growth=True, example_inputs=image, verify=True)
    assert len(fxfact.plan_of(result).rewrites) == 2


def test_a_bias_that_is_read_elsewhere_is_kept(image: Tensor) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) - self.conv.bias.reshape(-1, 1, 1)

    model = Reading()
    result = fxfact.factorize(model, example_inputs=image, capture="trace")
    assert "bias is also read by reshape" in fxfact.plan_of(result)["conv"].reason
    assert result(image).equal(model(image))
    result = fxfact.factorize(model, example_inputs=image, verify=True)  # a stand-in can give its bias away
    assert [d.path for d in fxfact.plan_of(result).rewrites] == ["conv"]


def test_what_another_convolution_holds_is_left_with_it(image: Tensor) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(4, 4, 3, padding=1)
            self.up = nn.ConvTranspose2d(4, 4, 3, padding=1)
            self.up.weight = self.down.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x))

    class BothWays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)

    class TwoGroups(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(2, 4, 3, padding=1)
            self.other = nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(x[:, :2]))

    for model in (Tied(), BothWays(), TwoGroups()):
        result = fxfact.factorize(model, rank=0.5, example_inputs=image, verify=True)
        assert fxfact.plan_of(result).rewrites == ()
        assert not {id(p) for p in model.parameters()} & {id(p) for p in result.parameters()}
        assert result(image).equal(model(image))


def test_a_plan_for_untied_weights_is_refused_by_tied_ones() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))

    tied = model()
    tied[1].weight = tied[0].weight
    with pytest.raises(PlanError, match="and the weight of 0"):
        fxfact.apply(fxfact.plan(model(), exclude="0"), tied)


def test_a_buffer_that_forward_changes_is_not_traced(image: Tensor) -> None:
    class Counting(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x)

    model = Counting()
    with pytest.raises(CaptureError, match="count: forward changes this buffer"):
        fxfact.factorize(model, capture="trace")
    result = fxfact.factorize(model, example_inputs=image, verify=True)
    assert (float(model.count), float(result.count)) == (0, 0)
    result(image)
    assert float(result.count) == 1


def test_every_spelling_is_rewritten(small: Small, image: Tensor) -> None:
    aten = torch.ops.aten

    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernels = nn.ParameterList([torch.randn(4, 4, 3, 3) / 6 for _ in range(7)])

        def forward(self, x: Tensor) -> Tensor:
            k = self.kernels
            x = aten.conv2d.default(x, k[0], None, [1], [1])
            x = aten.conv2d.padding(x, k[1], None, [1, 1], "same")
            x = aten.convolution.default(x, k[2], None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
            x = aten.convolution.default(x, k[3], None, [2, 2], [1, 1], [1, 1], True, [1, 0], 1)
            x = torch.convolution(x, k[4], None, [1, 1], [0, 0], [1, 2], False, [0, 0], 1)
            x = aten.conv_transpose2d.input(x, k[5], None, [2, 2])
            return F.conv_transpose2d(x, k[6], stride=2, output_padding=1, dilation=2)

    model = Spelled()
    assert [d.path for d in fxfact.plan(model)] == [f"kernels.{k}" for k in range(7)]
    for inputs in (image, None):
        source = model if inputs is not None else torch.export.export(model, (image,))
        result = fxfact.factorize(source, "tt", example_inputs=inputs, verify=True, allow_growth=True, rank=10**6)
        assert len(fxfact.plan_of(result).rewrites) == 7
        assert apart(model(image), (result if inputs is not None else result.module())(image)) < 1e-5


def test_a_spelling_that_is_not_known_is_listed() -> None:
    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.shift = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.conv_tbc(x, self.kernel, self.shift)

    (decision,) = fxfact.plan(Spelled())
    assert "a convolution that fxfact does not support" in decision.reason


def test_a_pruned_convolution_is_listed_and_the_rest_rewritten(small: Small) -> None:
    prune.l1_unstructured(small.first, "weight", 0.5)
    result = fxfact.factorize(small)
    assert [d.factorization is None for d in fxfact.plan_of(result)] == [True, False]


def test_containers_and_many_arguments_are_example_inputs(image: Tensor) -> None:
    class Containers(Small):
        def forward(self, xs: list[Tensor], scale: dict[str, Tensor]) -> Tensor:
            return super().forward(xs[0] + xs[1]) * scale["by"]

    class Many(Small):
        def forward(self, *xs: Tensor) -> Tensor:
            return super().forward(xs[0] + xs[1])

    inputs = ([image, image], {"by": torch.ones(())})
    assert fxfact.factorize(Containers(), example_inputs=inputs, verify=True)(*inputs).shape == (3, 5)
    assert fxfact.plan(Many(), example_inputs=(image, image)).network.macs == capture(Small(), image).macs


def test_a_buffer_as_weight_is_counted_and_stays_untrained(image: Tensor) -> None:
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


def test_hooks_that_tracing_would_lose_are_not_traced(small: Small, image: Tensor) -> None:
    block = nn.Sequential(small)
    handle = small.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(CaptureError, match="0 has hooks"):
        fxfact.factorize(block, capture="trace")
    result = fxfact.factorize(block, example_inputs=image, verify=True)
    assert (fxfact.plan_of(result).capture, len(fxfact.plan_of(result).rewrites)) == ("modules", 2)
    handle.remove()
    small.norm.register_forward_hook(lambda module, args, output: output + 1)
    result = fxfact.factorize(block, example_inputs=image, verify=True)
    assert len(fxfact.plan_of(result).rewrites) == 2


def test_every_node_has_a_verdict() -> None:
    captured = capture(Zoo(), how="trace")
    found = match(captured.network).verdicts
    assert list(found) == list(captured.network.graph.nodes)
    assert all(item.reason for item in found.values() if isinstance(item, Skip))


def test_what_can_be_rewritten_in_the_zoo_is_rewritten_right() -> None:
    torch.manual_seed(0)
    model, x = Zoo().eval(), torch.randn(2, 8, 12, 12)
    options = {"rank": 10**6, "example_inputs": x, "allow_growth": True, "verify": True, "capture": "trace"}
    result = fxfact.factorize(model, "spatial_svd", **options)
    assert {d.path for d in fxfact.plan_of(result).rewrites} == {"module", "subclass", "transposed", "constant"}
    assert apart(model(x), result(x)) < 1e-4
    names = set(dict(result.named_parameters()))
    assert {"module.0.weight", "module.1.bias", "subclass.0.weight", "constant.1.weight", "kernel"} <= names
    assert not any(name in names for name in ("module.weight", "subclass.weight", "subclass.bias"))
    assert "constant" not in dict(result.named_buffers())
    trained = {name for name, p in result.named_parameters() if p.requires_grad}
    assert "constant.0.weight" not in trained
    assert "module.0.weight" in trained


def test_names_stand_under_the_sites_own_path(small: Small) -> None:
    result = fxfact.factorize(small)
    assert [n for n in dict(result.named_parameters()) if "second" in n] == [f"second.{k}.weight" for k in range(3)]
    targets = [node.target for node in result.graph.nodes if node.op == "call_module"]
    assert targets[:4] == ["first.0", "first.1", "first.2", "norm"]


def test_meta_is_kept_and_provenance_recorded(small: Small, image: Tensor) -> None:
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


def test_recorded_shapes_are_never_stale(small: Small, image: Tensor) -> None:
    for kind in ("tensor_meta", "val", "both"):
        traced = fx.symbolic_trace(small)
        if kind != "val":
            ShapeProp(traced).propagate(image)
        if kind != "tensor_meta":
            FakeTensorProp(traced, FakeTensorMode(allow_non_fake_inputs=True)).propagate(image)
        result = FactorizeConvs(fxfact.plan(small))(traced).graph_module
        truth = copy.deepcopy(result)
        ShapeProp(truth).propagate(image)
        for node, real in zip(result.graph.nodes, truth.graph.nodes, strict=True):
            for key in ("tensor_meta", "val"):
                assert (key in node.meta) == (kind in (key, "both")) or node.op in ("get_attr", "output")
                if key in node.meta and node.op != "output":
                    assert tuple(node.meta[key].shape) == tuple(real.meta["tensor_meta"].shape)


def test_without_shapes_none_are_invented(small: Small) -> None:
    result = fxfact.factorize(small)
    assert not any("tensor_meta" in node.meta or "val" in node.meta for node in result.graph.nodes)


def test_the_pass_runs_in_torchs_pass_manager(small: Small, image: Tensor) -> None:
    plan, traced = fxfact.plan(small, "tt"), fx.symbolic_trace(small)
    code = traced.code
    manager = PassManager(passes=[FactorizeConvs(plan)], constraints=[], steps=5)
    result = manager(traced)
    assert result.modified
    assert traced.code == code
    assert result.graph_module(image).equal(fxfact.apply(plan, small)(image))
    again = FactorizeConvs(plan)(result.graph_module)
    assert not again.modified
    assert again.graph_module is result.graph_module


def test_a_plan_that_rewrites_nothing_modifies_nothing(small: Small) -> None:
    traced = fx.symbolic_trace(small)
    result = FactorizeConvs(fxfact.plan(small, exclude="*"))(traced)
    assert not result.modified
    assert result.graph_module is traced
    left = fxfact.factorize(small, exclude="*")
    assert fxfact.plan_of(left).rewrites == ()
    assert left.first.weight.data_ptr() != small.first.weight.data_ptr()


def test_a_convolution_called_twice_stays_shared(image: Tensor) -> None:
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


def test_a_weight_of_two_convolutions_stays_shared(image: Tensor) -> None:
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


@pytest.mark.parametrize("factorization", ["channel_svd", "spatial_svd"])
@pytest.mark.parametrize("settings", [{"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2, "bias": False}])
def test_budgets_are_met_where_convolutions_that_share_a_weight_differ(
    factorization: str, settings: dict[str, Any], image: Tensor
) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(4, 16, 1)
            self.two = nn.Conv2d(16, 16, 3, padding=1)
            self.three = nn.Conv2d(16, 16, 3, **settings)
            self.three.weight = self.two.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.three(torch.relu(self.two(self.one(x))))

    for share in (0.5, 0.7):
        plan = fxfact.plan(Tied(), factorization, budget=fxfact.Macs(share), example_inputs=image)
        assert plan.after.macs <= share * plan.network.macs
        assert [decision.path for decision in plan.rewrites] == ["two", "three"]
        (point,) = {point.cost for point in plan.pareto_points if point.cost.macs == plan.after.macs}
        assert point.params == plan.after.params


def test_calls_with_different_settings_of_one_weight_are_left_alone(image: Tensor) -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, padding=1) + F.conv2d(x, self.weight, padding=2, dilation=2)

    (decision,) = fxfact.plan(Pyramid())
    assert "different settings" in decision.reason
    assert fxfact.factorize(Pyramid())(image).shape == image.shape


def test_training_mode_and_requires_grad_carry_over(small: Small) -> None:
    small.train()
    small.norm.eval()
    small.second.weight.requires_grad_(False)
    result = fxfact.factorize(small)
    modes = {name: module.training for name, module in result.named_modules()}
    assert modes.pop("norm") is False
    assert all(modes.values())
    assert not any(p.requires_grad for name, p in result.named_parameters() if name.startswith("second."))
    assert all(p.requires_grad for name, p in result.named_parameters() if name.startswith("first."))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_memory_format_carry_over(small: Small, image: Tensor, dtype: torch.dtype) -> None:
    model = small.to(dtype).to(memory_format=torch.channels_last)
    result = fxfact.factorize(model)
    assert {p.dtype for p in result.parameters()} == {dtype}
    core = result.get_submodule("second.1").weight
    assert core.is_contiguous(memory_format=torch.channels_last)
    x = image.to(dtype).to(memory_format=torch.channels_last)
    assert result(x).shape == model(x).shape


def test_result_and_original_share_no_memory(small: Small, image: Tensor) -> None:
    before = {name: value.clone() for name, value in small.state_dict().items()}
    result = fxfact.factorize(small, rank=0.4, example_inputs=image)
    with torch.no_grad():
        for tensor in (*result.parameters(), *result.buffers()):
            tensor.zero_()
    assert all(value.equal(before[name]) for name, value in small.state_dict().items())


def test_tracing_leaves_no_trace_on_the_model(image: Tensor) -> None:
    class Counting(Small):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = Counting().train()
    mean = model.norm.running_mean.clone()
    fxfact.factorize(model, example_inputs=image)
    assert model.calls == 0
    assert model.norm.running_mean.equal(mean)


def test_it_survives_copying_and_pickling(small: Small, image: Tensor) -> None:
    result = fxfact.factorize(small, "cp", example_inputs=image)
    copied = copy.deepcopy(result)
    for other in (copied, *(pickle.loads(pickle.dumps(each)) for each in (result, copied))):
        assert other(image).equal(result(image))
        assert fxfact.plan_of(other) == fxfact.plan_of(result)


def test_a_factorized_network_can_be_factorized_again(small: Small, image: Tensor) -> None:
    once = fxfact.factorize(small, "tucker", rank=0.6)
    twice = fxfact.factorize(once, "spatial_svd", include="*.1", allow_growth=True, example_inputs=image, verify=True)
    assert {d.path for d in fxfact.plan_of(twice).rewrites} == {"first.1", "second.1"}
    assert twice(image).shape == once(image).shape
    (source,) = next(n for n in twice.graph.nodes if n.target == "second.1.0").meta["from_node"]
    assert [earlier.name for earlier in source.from_node] == ["second"]


def test_the_contract_is_checked(small: Small, image: Tensor) -> None:
    traced = capture(small, image).network
    node = next(node for node in traced.graph.nodes if node.target == "second")
    node.meta["tensor_meta"] = node.meta["tensor_meta"]._replace(shape=torch.Size([3, 12, 9, 9]))
    with pytest.raises(GraphError, match="second records shape"):
        FactorizeConvs(fxfact.plan(small))(traced)
    traced = capture(small).network
    traced.graph.erase_node(traced.graph.output_node())
    traced.graph.output(next(iter(traced.graph.nodes)))
    with pytest.raises(GraphError, match="recompile"):
        check_invariants(traced, "here")
    traced = capture(small).network
    next(node for node in traced.graph.nodes if node.target == "second").target = "third"
    with pytest.raises(GraphError, match=r"here: .*third"):
        check_invariants(traced, "here")


def test_the_pass_refuses_a_graph_that_the_plan_was_not_made_for(small: Small) -> None:
    other = nn.Sequential(nn.Conv2d(4, 8, 3))
    with pytest.raises(PlanError, match=r"first: the plan has Conv2d\(4→8"):
        FactorizeConvs(fxfact.plan(small))(fx.symbolic_trace(other))


def test_macs_of_the_network_are_for_one_sample(small: Small, image: Tensor) -> None:
    expected = 4 * 8 * 9 * 100 + 8 * 12 * 9 * 25 + 12 * 5
    assert capture(small, image).macs == expected
    assert capture(small, image[:1]).macs == expected
    assert capture(nn.Conv2d(4, 8, 3, padding=1), image[0]).macs == 4 * 8 * 9 * 100
    assert capture(small, {"x": image}).macs == capture(small, (image,)).macs == expected


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.zeros(1, 3, 8, 8), "fails on example_inputs: Given groups=1"),
        (torch.zeros(1, 4, 8, 8, device="meta"), "fails on example_inputs"),
        ({"y": torch.zeros(1)}, "do not fit"),
        ((torch.zeros(1), torch.zeros(1)), "do not fit"),
    ],
)
def test_example_inputs_that_do_not_fit_are_refused(small: Small, inputs: object, words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        fxfact.plan(small, example_inputs=inputs)  # type: ignore[arg-type]
