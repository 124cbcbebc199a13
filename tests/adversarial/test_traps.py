"""Models that a capture could change without notice: each is captured correctly, or refused."""

from __future__ import annotations

import copy
import random
import types
from collections import OrderedDict, UserDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim, export

import fxfact
from fxfact.errors import ArgumentError, ArgumentTypeError, CaptureError, PlanError
from tests.support import apart

pytestmark = pytest.mark.filterwarnings("ignore")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(8, 16, 3, padding=1)
        self.d = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.d(self.c(x).relu())


class Branching(Two):
    def forward(self, x: Tensor) -> Any:
        return Two.forward(self, x if x.sum() > 1e9 else x + 1)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(0))


def reasons(network: Any) -> dict[str, str]:
    return {d.path: d.reason for d in fxfact.plan_of(network) if d.reason}


def why(model: nn.Module) -> str:
    """Why it is not traced."""
    with pytest.raises(CaptureError) as caught:
        fxfact.factorize(model, capture="trace")
    return str(caught.value)


def right(model: nn.Module, x: Any) -> Any:
    """Factorize with any front end, and check the result."""
    result = fxfact.factorize(model, example_inputs=x, verify=True, rank=0.5)
    assert fxfact.verify(model, result, x).graph < 1e-5
    return result


@pytest.mark.parametrize("kind", [Two, Branching])
@pytest.mark.parametrize("patched", ["_conv_forward", "forward"])
def test_convolution_with_a_patched_method_is_skipped(kind: type[Two], patched: str, x: Tensor) -> None:
    model = kind().eval()

    def thrice(self: nn.Conv2d, input: Tensor, *_: Any) -> Tensor:
        return 3 * F.conv2d(input, self.weight, self.bias, padding=1)

    setattr(model.c, patched, types.MethodType(thrice, model.c))
    assert "replaced on this instance" in reasons(right(model, x))["c"]
    assert "c" not in [d.path for d in fxfact.plan(kind(), capture="modules").edited("c", skip="-").rewrites]
    unseen = fxfact.plan(model, capture="modules")
    assert "replaced on this instance" in unseen["c"].reason


def test_tensors_that_a_copy_cannot_follow_are_refused(x: Tensor) -> None:
    class Closure(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(16)
            self.f = lambda t: self.bn(t) * 1

        def forward(self, x: Tensor) -> Tensor:
            return self.f(super().forward(x))

    wrapped = Branching()
    old = wrapped.d.forward
    wrapped.d.forward = lambda t: old(t) * 2
    for model in (Closure().train(), wrapped):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CaptureError, match=r"(bn|d)\.\w+: forward uses this tensor through a closure"):
            fxfact.factorize(model, example_inputs=x)
        assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_outputs_that_cannot_be_compared_are_refused(x: Tensor) -> None:
    class Opaque:
        __slots__ = ("value",)

        def __init__(self, value: Tensor) -> None:
            self.value = value

    class Hidden(Branching):
        def forward(self, x: Tensor) -> Opaque:
            return Opaque(super().forward(x))

    with pytest.raises(CaptureError, match="holds no tensors"):
        fxfact.factorize(Hidden(), example_inputs=x)


def test_attributes_changed_during_forward_are_noticed(x: Tensor) -> None:
    class Unpadded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            old, self.padding = self.padding, (0, 0)
            try:
                return super().forward(x)
            finally:
                self.padding = old

    class Within(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.c = Unpadded(8, 16, 3, padding=1)

    class FromOutside(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = 0
            for size in (1, 2, 3):
                self.c.dilation = self.c.padding = (size, size)
                y = y + self.c(x)
            return self.d(y)

    for model in (Within(), FromOutside()):
        assert "attributes are changed" in reasons(right(model.eval(), x))["c"]
    assert "attributes" in why(FromOutside())
    stale = Two()
    stale.c = nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular")
    stale.c.padding = (2, 2)
    assert "padding was changed" in fxfact.plan(stale)["c"].reason
    pruned = Two()
    pruned.d.out_channels = 99
    assert "describe a weight of (99, 16, 3, 3)" in fxfact.plan(pruned)["d"].reason


def autocast(self: Two, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return Two.forward(self, x)


def inference(self: Two, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = self.c(x)
    return self.d(y.clone())


def enabling(self: Two, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return Two.forward(self, x)


def asking(self: Two, x: Tensor) -> Tensor:
    y = Two.forward(self, x)
    return y if torch.is_grad_enabled() else y / 2


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def reverses(self: Two, x: Tensor) -> Tensor:
    return self.d(Reversed.apply(self.c(x)))


def remembers(self: Two, x: Tensor) -> Tensor:
    self.feature = self.c(x)
    return self.d(self.feature)


def draws(self: Two, x: Tensor) -> Tensor:
    return Two.forward(self, x + torch.randn(1, 8, 1, 1))


def doubles(self: Two, x: Tensor, up: Tensor | None = None) -> Tensor:
    y = Two.forward(self, x)
    return y * 100 if up is None else y


LOST = {
    autocast: "autocast",
    inference: "gradients off",
    enabling: "gradients on",
    asking: "is_grad_enabled",
    reverses: "autograd.Function",
    remembers: "sets the attribute 'feature'",
    draws: "draws random numbers",
    doubles: "whether up is given",
}


@pytest.mark.parametrize("forward", LOST, ids=lambda forward: forward.__name__)
def test_model_that_a_graph_would_change_keeps_its_python(forward: Any, x: Tensor) -> None:
    torch.manual_seed(0)
    model = type("Losing", (Two,), {"forward": forward})().eval()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert LOST[forward] in why(model)
    result = fxfact.factorize(model, example_inputs=(x, x) if forward is doubles else x, verify=True)
    assert fxfact.plan_of(result).capture == "modules"
    assert torch.get_rng_state().equal(states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert result(x).dtype == expected.dtype
    if forward is remembers:
        assert result.feature.shape == (2, 16, 12, 12)
    with torch.no_grad():
        without = result(x)
    assert without.requires_grad == (forward is enabling)
    assert torch.allclose(without * (2 if forward is asking else 1), result(x)) or forward is draws
    if forward is doubles:
        assert result(x).norm() > 30 * result(x, x).norm()


def test_model_with_a_replaced_call_is_not_traced(x: Tensor) -> None:
    class Called(Two):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 3

    patched = Two().eval()
    patched.forward = types.MethodType(lambda self, x: Two.forward(self, x) * 3, patched)
    for model in (Called().eval(), patched):
        assert "a forward or __call__ of its own" in why(model)
        assert fxfact.plan_of(right(model, x)).capture == "modules"


def test_model_that_creates_constants_is_traced(x: Tensor) -> None:
    class Constant(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.tensor(2.0)

    class ByMode(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.tensor(2.0 if self.training else 1.0)

    assert fxfact.plan_of(right(Constant().eval(), x)).capture == "trace"
    assert "values differ between calls" in why(ByMode())


def test_example_inputs_of_any_type_are_not_changed(x: Tensor) -> None:
    class InPlace(Branching):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch["x"].mul_(2))

    batch = UserDict(x=x)
    before = x.clone()
    fxfact.factorize(InPlace(), example_inputs=(batch,), verify=True)
    assert x.equal(before)


def test_scripted_convolutions_are_skipped_and_stay_trainable(x: Tensor) -> None:
    model = Two().eval()
    model.c = torch.jit.script(model.c)
    for capture in ("trace", "modules"):
        result = fxfact.factorize(model, example_inputs=x, capture=capture)
        assert "c" in " ".join(reasons(result))
        assert any(name.startswith("c.") for name in result.state_dict())
        assert all(p.is_leaf and p.requires_grad for p in result.parameters())
        result(x).sum().backward()
        assert all(p.grad is None for p in model.parameters())
        fxfact.distill(result, model, [x, x], steps=1, likelihood="gaussian")
    given: dict[str, Any] = {"calibration": [x], "held_out": [x], "likelihood": "gaussian"}
    small = fxfact.factorize(model, budget=fxfact.Macs(0.8), **given)
    assert fxfact.plan_of(small).measured_loss_increase is not None


def test_convolution_that_scales_its_bias_is_skipped(x: Tensor) -> None:
    class Gain(nn.Conv2d):
        gain = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, self.bias * self.gain, padding=1)

    class Holding(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.c = Gain(8, 16, 3, padding=1)

    assert "its forward computes its bias" in reasons(right(Holding(), x))["c"]


def test_convolution_with_modules_inside_is_rewritten_and_keeps_its_modes(x: Tensor) -> None:
    class WithNorm(nn.Conv2d):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.norm = nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(super().forward(x))

    class Holding(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.c = WithNorm(8, 16, 3, padding=1)
            self.d = nn.utils.parametrizations.weight_norm(self.d)

    model = Holding().train()
    model.c.norm.eval()
    result = fxfact.factorize(model, example_inputs=x, fold_weights=True, verify=True)
    assert reasons(result) == {}
    assert result.c.training
    assert not result.c.norm.training
    assert result.d.training


def test_folding_refuses_writes_to_parameters_and_skips_in_place_changes(x: Tensor) -> None:
    class Clamped(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            weight.data.clamp_(-0.01, 0.01)
            return weight

    class InPlace(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            weight.mul_(0.5)
            return F.conv2d(x, weight, self.bias, padding=1)

    clamped = Two()
    torch.nn.utils.parametrize.register_parametrization(clamped.c, "weight", Clamped(), unsafe=True)
    kept = clamped.c.parametrizations.weight.original.detach()
    kept.fill_(1.0)
    with pytest.raises(CaptureError, match="changes this parameter"):
        fxfact.factorize(clamped, fold_weights=True)
    assert bool((kept == 1).all())
    model = Two().eval()
    model.c = InPlace(8, 16, 3, padding=1)
    result = fxfact.factorize(model, exclude="d", fold_weights=True)
    with torch.no_grad():
        assert apart(model(x), result(x)) == apart(model(x), result(x)) == 0


def test_convolutions_in_regions_of_a_program_are_listed(x: Tensor) -> None:
    class Frozen(Two):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.c(x)
            return self.d(x)

    program = export(Frozen(), (x,))
    result = fxfact.factorize(program, verify=True)
    assert [d.path for d in fxfact.plan_of(result).rewrites] == ["d"]
    assert any("inside it is conv2d" in reason for reason in reasons(result).values())


def test_program_keeps_dynamic_integers_and_derived_sizes(x: Tensor) -> None:
    class Repeating(Two):
        def forward(self, x: Tensor, half: Tensor, times: int) -> Tensor:
            return super().forward(x) * times + half.repeat_interleave(2, dim=-1)

    size = Dim("size", min=2, max=16)
    shapes = {"x": {3: 2 * size}, "half": {3: size}, "times": Dim.DYNAMIC}
    program = export(Repeating(), (x, torch.randn(2, 1, 12, 6), 3), dynamic_shapes=shapes)
    result = fxfact.factorize(program, verify=True, rank=0.5)
    assert len(result.range_constraints) == len(program.range_constraints)
    assert result.module()(torch.randn(2, 8, 12, 20), torch.randn(2, 1, 12, 10), 7).shape == (2, 16, 12, 20)


def test_capture_works_in_inference_mode_and_with_a_submodule_named_meta(x: Tensor) -> None:
    model = Two()
    model.register_buffer("count", torch.zeros(()))
    with torch.inference_mode():
        result = fxfact.factorize(model, example_inputs=x, verify=True)
        made_inside = Two()
    result(x).sum().backward()
    assert result.get_submodule("c.0").weight.grad is not None
    with pytest.raises(CaptureError, match=r"c\.\w+: the parameter was made in inference mode"):
        fxfact.factorize(made_inside)
    model.meta = nn.Identity()
    assert len(fxfact.plan_of(right(model, x)).rewrites) == 2


def test_convolution_with_state_dict_hooks_is_skipped(x: Tensor) -> None:
    model = Branching()
    model.c.register_state_dict_post_hook(lambda module, state, prefix, local: state.update({prefix + "extra": 1}))
    result = right(model, x)
    assert "hooks on its state_dict" in reasons(result)["c"]
    assert {"c.weight", "c.extra"} <= set(result.state_dict())


def test_wrong_arguments_raise_errors_of_fxfact(x: Tensor) -> None:
    model = Two()
    plan = fxfact.plan(model)
    with ThreadPoolExecutor(1) as executor:
        pass
    calls = [
        (ArgumentError, "shut down", lambda: fxfact.factorize(model, executor=executor)),
        (ArgumentTypeError, "iterable", lambda: fxfact.factorize(model, progress=lambda *_, **__: None)),
        (ArgumentError, "yield every item", lambda: fxfact.factorize(model, progress=lambda *_, **__: [])),
        (ArgumentTypeError, "leaf_modules", lambda: fxfact.factorize(model, leaf_modules=3)),
        (ArgumentTypeError, "leaf_modules", lambda: fxfact.factorize(model, leaf_modules=[3])),
        (PlanError, "not a plan", lambda: fxfact.Plan.load(3)),
        (PlanError, "cannot be written", lambda: plan.save("/nonexistent/plan.json")),
        (ArgumentError, "context", lambda: fxfact.diff(model, model, context=-1)),
        (ArgumentTypeError, "reason", lambda: plan.edited("c", skip=3)),
    ]
    for error, words, call in calls:
        with pytest.raises(error, match=words):
            call()
    assert copy.deepcopy(model)(x).equal(model(x))


class Choosing(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        return torch.cond(y.sum() > 0, self.d, lambda t: t * 2, (y,))


def test_convolutions_in_branches_of_operators_are_listed_and_skipped(x: Tensor) -> None:
    model = Choosing().eval()
    program = export(model, (x,))
    result = fxfact.factorize(program, verify=True, rank=0.5)
    assert [d.path for d in fxfact.plan_of(result).rewrites] == ["c"]
    assert any("inside it is conv2d" in reason for reason in reasons(result).values())


def test_model_with_regions_without_autocast_keeps_its_python(x: Tensor) -> None:
    class Precise(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = self.c(x)
            with torch.autocast("cpu", enabled=False):
                return self.d(y.float())

    class Asking(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * 2 if torch.is_autocast_enabled("cpu") else y

    assert "turns autocast on or off" in why(Precise())
    assert "is_autocast_enabled" in why(Asking())
    for model in (Precise().eval(), Asking().eval()):
        result = right(model, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert result(x).dtype == model(x).dtype


@pytest.mark.parametrize("branch", ["torch", "numpy", "random", "gradients"])
def test_randomness_in_training_mode_only_is_noticed(branch: str, x: Tensor) -> None:
    below = {
        "torch": lambda: torch.rand(1).item() < 0.5,
        "numpy": lambda: np.random.rand() < 0.5,
        "random": lambda: random.random() < 0.05,
        "gradients": lambda: torch.is_grad_enabled() and random.random() < 0.5,
    }

    class Skipping(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = self.c(x)
            return x if self.training and below[branch]() else self.d(x)

    model = Skipping().eval()
    assert "training=True" in why(model)
    result = fxfact.factorize(model, exclude="*", example_inputs=x).train()
    assert len({float(result(x).sum()) for _ in range(200)}) == 2


def test_hooks_on_an_inner_graph_module_are_refused(x: Tensor) -> None:
    inner = fx.symbolic_trace(nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()))
    model = nn.Sequential(inner, nn.Conv2d(16, 16, 3)).eval()
    small = fxfact.factorize(model, rank=0.5, example_inputs=x)
    handle = inner.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(CaptureError, match="the GraphModule at 0 has hooks"):
        fxfact.factorize(model, rank=0.5, example_inputs=x)
    handle.remove()
    small.register_forward_hook(lambda module, args, output: output * 2)
    for nearer in (fxfact.refit, fxfact.distill):
        with pytest.raises(CaptureError, match="the GraphModule has hooks"):
            nearer(small, model, x.split(1), likelihood="gaussian")


def test_output_containers_keep_their_class(x: Tensor) -> None:
    class Output(OrderedDict[str, Tensor]):
        @property
        def logits(self) -> Tensor:
            return self["logits"]

    class Named(Two):
        def forward(self, x: Tensor) -> Any:
            return Output(logits=super().forward(x))

    class Ordered(Two):
        def forward(self, x: Tensor) -> Any:
            return OrderedDict(out=super().forward(x))

    assert "makes a Output" in why(Named())
    assert right(Named().eval(), x)(x).logits.shape == (2, 16, 12, 12)
    assert fxfact.plan_of(right(Ordered().eval(), x)).capture == "trace"


@pytest.mark.parametrize("training", [True, False])
def test_shapes_are_recorded_from_one_sample_in_any_mode(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
    plan = fxfact.plan(model.train(training), example_inputs=torch.randn(1, 3, 16, 16), capture="trace")
    assert plan["2"].input_sizes == ((1, 1),)
    assert all(module.training == training for module in model.modules())
    result = fxfact.apply(plan, model)
    assert all(module.training == training for module in result.modules())


@pytest.mark.parametrize("inner", [nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)], ids=["norm", "conv"])
def test_bias_that_a_called_module_holds_is_kept(inner: nn.Module) -> None:
    class Borrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner
            self.kernel = nn.Parameter(torch.randn(16, 8, 3, 3) / 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(F.conv2d(x, self.kernel, self.inner.bias, padding=1))

    model, x = Borrowing().eval(), torch.randn(2, 8, 9, 9)
    result = fxfact.factorize(model, "channel_svd", rank=10**6, allow_growth=True, example_inputs=x, capture="trace")
    assert "kernel" in {d.path for d in fxfact.plan_of(result).rewrites}
    torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-5)


def test_kernel_computed_from_buffers_is_folded() -> None:
    class Blurring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.register_buffer("kernel", torch.rand(1, 1, 3, 3))
            self.register_buffer("other", torch.rand(1, 1, 3, 3), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(self.conv(x), self.kernel.repeat(8, 1, 1, 1), groups=8)
            return F.conv2d(x, self.other.repeat(8, 1, 1, 1), groups=8)

    model, x = Blurring().eval(), torch.randn(1, 3, 12, 12)
    program = torch.export.export(model, (x,))
    result = fxfact.factorize(program, exclude="conv", factorization="spatial_svd", rank=10**6, fold_weights=True,
                              allow_growth=True)  # fmt: skip
    assert {d.path for d in fxfact.plan_of(result).rewrites} == {"kernel", "other"}
    torch.testing.assert_close(result.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_graph_with_flattened_arguments_is_refused(x: Tensor) -> None:
    class Summing(Two):
        def forward(self, xs: list[Tensor]) -> Tensor:
            return super().forward(xs[0] + xs[1])

    graph = fx.symbolic_trace(Summing().eval(), concrete_args={"xs": [fx.PH, fx.PH]})
    assert fxfact.plan(graph, example_inputs=([x, x],)).capture == "modules"
    with pytest.raises(CaptureError, match="takes its arguments apart"):
        fxfact.plan(graph, example_inputs=([x, x],), capture="trace")


def test_in_place_writes_are_noticed_without_example_inputs(x: Tensor) -> None:
    class Aliased(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = self.c(x)
            skip = y
            y += 1
            return self.d(y * 2 + skip)

    class Summing(Two):
        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros(2, 16, 12, 12)
            total += Two.forward(self, x)
            return total

    class Usual(Two):
        def forward(self, x: Tensor) -> Tensor:
            y = self.c(x)
            y += 1
            y *= 2
            y -= y / 2
            return self.d(y)

    assert "changes a tensor in place and then uses it" in why(Aliased())
    assert "writes to a tensor that it creates" in why(Summing())
    for kind in (Aliased, Summing, Usual):
        assert fxfact.plan_of(right(kind().eval(), x)).capture == ("trace" if kind is Usual else "modules")
    usual = Usual().eval()
    assert torch.allclose(fxfact.factorize(usual, exclude="*")(x), usual(x), atol=1e-5)


def test_container_with_a_replaced_forward_is_not_traced(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()).eval()
    model.forward = types.MethodType(lambda self, x: nn.Sequential.forward(self, x) * 3, model)
    assert "a forward or __call__ of its own" in why(model)
