"""The ladder: what each frontend takes, what it must not lose, and that nothing wrong is ever captured."""

from __future__ import annotations

import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxfact
from fxfact.capture import capture
from fxfact.errors import ArgumentError, CalibrationError, CaptureError, PlanError
from tests.support import Branching, Small, apart


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(value.equal(before[name]) for name, value in model.state_dict().items())


def factorized(model: nn.Module, inputs: Any, **options: Any) -> Any:
    """At a rank that cuts something, verified, and with the model seen to be untouched."""
    before = states(model)
    settings: dict[str, Any] = {"rank": 0.5, "example_inputs": inputs, "verify": True, "allow_growth": True, **options}
    result = fxfact.factorize(model, ["tucker", "channel_svd"], **settings)
    assert unchanged(model, before)
    return result


def reasons(network: Any) -> dict[str, str]:
    return {decision.path: decision.reason for decision in fxfact.plan_of(network) if decision.reason}


# The first frontend: traps of tracing


def test_a_model_that_traces_becomes_one_graph(small: Small, image: Tensor) -> None:
    result = factorized(small, image)
    plan = fxfact.plan_of(result)
    assert isinstance(result, fx.GraphModule)
    assert (plan.capture, plan.compared, plan.refused) == ("trace", True, ())
    assert "compared with the model on example inputs" in str(plan)


@pytest.mark.parametrize("name", ["own", "name", "leaves", "seed", "gradients", "given"])
def test_an_optional_argument_may_have_any_name(image: Tensor, name: str) -> None:
    """Those of functions of ours among them."""
    models: dict[str, Any] = {}
    for use in ("x", f"x if {name} is None else -x"):
        exec(f"def forward(self, x, {name}=None): return Small.forward(self, {use})", globals(), models)
        model = type("Optional", (Small,), {"forward": models["forward"]})()
        assert fxfact.plan_of(factorized(model, image)).capture == ("trace" if use == "x" else "modules")


def test_what_is_frozen_by_the_training_mode_is_not_traced(image: Tensor) -> None:
    class Dropping(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5, training=self.training))

    for mode in (True, False):
        model = Dropping().train(mode)
        result = factorized(model, image)
        assert "self.training" in fxfact.plan_of(result).refused[0]
        assert not result.train()(image).equal(result(image))
        assert result.eval()(image).equal(result(image))


def test_hooks_are_not_lost(small: Small, image: Tensor) -> None:
    calls: list[str] = []
    small.register_forward_hook(lambda module, args, output: output * 2)
    small.second.register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    result = factorized(small, image)
    assert fxfact.plan_of(result).capture == "modules"
    assert len(fxfact.plan_of(result).rewrites) == 2
    calls.clear()
    result(image)
    assert calls == ["FactorizedConv2d"]


def test_a_mistrace_is_caught_and_not_shipped(image: Tensor) -> None:
    class Lucky(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2 if isinstance(x, Tensor) else x)  # a Proxy is no Tensor

    model = Lucky().eval()
    with pytest.raises(CaptureError, match="trace: its output differs from the model's"):
        fxfact.factorize(model, example_inputs=image, capture="trace")
    result = factorized(model, image)
    assert fxfact.plan_of(result).capture == "modules"
    assert "output differs" in fxfact.plan_of(result).refused[0]


def test_a_mistrace_that_the_inputs_do_not_show_is_caught_on_others(image: Tensor) -> None:
    class Lucky(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.abs() if isinstance(x, Tensor) else x)

    assert fxfact.plan(Lucky().eval(), example_inputs=image.abs()).capture == "modules"


def test_gradients_that_forward_turns_off_stay_off(image: Tensor) -> None:
    class Frozen(Small):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.first(x)
            return self.head(self.second(x).mean((2, 3)))

    result = factorized(Frozen(), image)
    assert "gradients" in fxfact.plan_of(result).refused[0]
    result(image).sum().backward()
    assert result.get_submodule("first.0").weight.grad is None
    assert result.get_submodule("second.0").weight.grad is not None


def test_a_forced_rung_says_why_it_fails(image: Tensor) -> None:
    with pytest.raises(CaptureError, match=r"Branching cannot be captured. trace: torch\.fx cannot trace forward"):
        fxfact.factorize(Branching(), example_inputs=image, capture="trace")


def test_leaves_are_not_looked_into(image: Tensor) -> None:
    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Conv2d(4, 4, 3, padding=1)
            self.inside = Branching()

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(self.before(x))

    result = factorized(Holding(), image, leaf_modules="inside", capture="trace")
    plan = fxfact.plan_of(result)
    assert [d.path for d in plan.rewrites] == ["before"]
    assert "inside it is first, second" in plan["inside"].reason
    assert fxfact.apply(fxfact.Plan.from_json(plan.to_json()), Holding())(image).shape == (3, 5)
    assert len(fxfact.plan(Holding(), example_inputs=image, leaf_modules="inside").rewrites) == 3  # by its modules
    with pytest.raises(ArgumentError, match="no module at 'outside'"):
        fxfact.plan(Holding(), leaf_modules=["outside"])


def test_the_rung_that_reaches_more_is_taken(small: Small, image: Tensor) -> None:
    small.first.register_forward_pre_hook(lambda module, args: None)
    plan = fxfact.plan(small, example_inputs=image)
    assert (plan.capture, len(plan.rewrites)) == ("modules", 2)
    assert plan.refused == ("trace: 1 convolutions, not 2",)
    assert len(fxfact.plan(small, example_inputs=image, capture="trace").rewrites) == 1


# The second frontend: the model keeps its own Python


def test_a_stand_in_mirrors_the_convolution(image: Tensor) -> None:
    model = Branching().eval()
    result = factorized(model, image)
    assert type(result) is Branching
    for name in ("first", "second"):
        old, new = getattr(model, name), getattr(result, name)
        assert isinstance(new, nn.Conv2d)
        for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            assert getattr(new, attribute) == getattr(old, attribute)
        assert (new.padding_mode, new.transposed, new.output_padding) == ("zeros", False, (0, 0))
        assert (new.weight.shape, new.weight.dtype) == (old.weight.shape, old.weight.dtype)
        assert (new.bias is None) == (old.bias is None)
        x = torch.randn(2, old.in_channels, 7, 7)
        assert apart(F.conv2d(x, new.weight, new.bias, new.stride, new.padding), new(x)) < 1e-5
        for attribute in ("weight", "stride"):
            with pytest.raises(ArgumentError, match=rf"{attribute} of a factorized convolution.* its stages 0, 1, 2"):
                setattr(new, attribute, getattr(old, attribute))


def test_names_are_those_of_a_graph_and_everything_ordinary_works(image: Tensor) -> None:
    result = factorized(Branching().eval(), image)
    assert set(result.state_dict()) == set(factorized(Small(), image).state_dict())
    twin = copy.deepcopy(result)
    twin.load_state_dict(result.state_dict())
    assert twin(image).equal(result(image))
    assert fxfact.plan_of(twin) == fxfact.plan_of(result)
    result.train()(image).square().mean().backward()
    assert all(parameter.grad is not None for parameter in result.parameters())
    shown = str(fxfact.inspect(result, example_inputs=image))
    assert "tucker" in shown
    assert "Conv2d(4→" in shown
    changes = fxfact.diff(Branching(), result)
    assert "first.0: Conv2d(" in changes


class Causal(nn.Conv1d):
    """Pads, then leaves the rest to PyTorch."""

    def forward(self, x: Tensor, shift: int = 0) -> Tensor:
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1) + shift, 0)))


class Masked(nn.Conv1d):
    """Calls the functional convolution on its own weight, and gives more than one output."""

    def forward(self, x: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        keep = torch.arange(x.shape[-1])[None] < length[:, None]
        x = F.conv1d(
            input=x * keep[:, None], weight=self.weight, bias=self.bias, stride=self.stride, padding=self.padding
        )
        return x, length // self.stride[0]


class Standardised(nn.Conv1d):
    """Computes its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight - self.weight.mean((1, 2), keepdim=True), self.bias)


class Otherwise(nn.Conv1d):
    """Does not convolve as its attributes say."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, self.bias, stride=2)


class Reading(nn.Conv1d):
    """Convolves as it should, and looks at its weight besides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.norm()


class Subclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.causal = Causal(8, 8, 3, dilation=2)
        self.masked = Masked(8, 8, 3, stride=2, padding=1)
        self.standardised = Standardised(8, 8, 3)
        self.otherwise = Otherwise(8, 8, 3)
        self.reading = Reading(8, 8, 3)
        self.never = Causal(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, length = self.masked(self.causal(x, shift=1), torch.tensor([9, 30]))
        return self.reading(self.otherwise(self.standardised(x[: len(length)])))


def test_subclasses_are_replaced_where_they_are_seen_to_convolve_and_nothing_else() -> None:
    torch.manual_seed(0)
    model, x = Subclasses(), torch.randn(2, 8, 40)
    result = factorized(model, x, capture="modules")
    left = reasons(result)
    assert [d.path for d in fxfact.plan_of(result).rewrites] == ["causal", "masked"]
    assert isinstance(result.causal, Causal)
    assert isinstance(result.masked, Masked)
    assert "also read by aten.mean" in left["standardised"]
    assert "in another way than its attributes say" in left["otherwise"]
    assert "also read by aten.linalg_vector_norm" in left["reading"]
    assert left["never"] == "forward does not call it"
    for network in (copy.deepcopy(result), torch.compile(result, backend="aot_eager")):
        assert apart(result(x), network(x)) < 1e-6
    assert apart(result(x), torch.export.export(result, (x,)).module()(x)) < 1e-6
    again = fxfact.apply(fxfact.plan_of(result), model)
    assert again(x).equal(result(x))


def test_a_weight_that_is_used_elsewhere_keeps_its_module(image: Tensor) -> None:
    class Combined(Branching):
        """Makes one kernel of two, as braindecode does: neither module is called."""

        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Conv2d(12, 12, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.first(x if x.sum() > 1e9 else x + 1))
            kernel = torch.einsum("om,mikl->oikl", self.third.weight[:, :, 0, 0], self.second.weight)
            return F.conv2d(x, kernel, self.third.bias)

    result = factorized(Combined(), image)
    left = reasons(result)
    assert [d.path for d in fxfact.plan_of(result).rewrites] == ["first"]
    assert "its weight is also read by" in left["second"]
    assert "its weight is also read by" in left["third"]
    assert "called as a function, with a weight that is computed" in left["forward"]


def test_tied_and_shared_convolutions_share_their_chain(image: Tensor) -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(4, 4, 3, padding=1)
            self.two = nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.two.weight = self.one.weight
            self.three = self.one
            self.hidden = [self.one]

        def forward(self, x: Tensor) -> Tensor:
            x = x if x.sum() > 1e9 else x + 1
            return self.three(self.two(self.hidden[0](x)))

    result = factorized(Sharing(), image)
    plan = fxfact.plan_of(result)
    assert [(d.path, d.tied_to) for d in plan.rewrites] == [("one", None), ("two", "one")]
    assert result.three is result.one is result.hidden[0]
    assert result.get_submodule("two.0").weight is result.get_submodule("one.0").weight
    assert sum(p.numel() for p in result.parameters()) == plan.after.params

    class HeldByALinear(Sharing):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Linear(1, 1)
            self.embedding.weight = self.one.weight

    left = {d.path: d.reason for d in fxfact.plan(HeldByALinear(), example_inputs=image)}
    assert left == dict.fromkeys(("one", "two"), "its weight is also held by embedding")


def test_tied_convolutions_that_are_called_in_another_order_than_defined(image: Tensor, tmp_path: Path) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
            self.one.weight = self.two.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.two(x if x.sum() > 1e9 else x + 1))

    model = Backwards()
    small = factorized(model, image)
    plan = fxfact.plan_of(small)
    assert (plan.capture, plan["one"].tied_to) == ("modules", "two")
    torch.testing.assert_close(fxfact.apply(plan, model)(image), small(image))
    fxfact.save(small, tmp_path / "small.pt")
    torch.testing.assert_close(fxfact.load(tmp_path / "small.pt", Backwards())(image), small(image))


def test_what_nobody_has_seen_run_is_replaced_by_order_only() -> None:
    model = nn.Sequential(Branching(), Causal(5, 8, 3))
    with pytest.raises(CaptureError, match=r"cannot be captured\. trace: .* Pass example_inputs"):
        fxfact.plan(model)
    plan = fxfact.plan(model, capture="modules")
    assert (plan.capture, plan.compared) == ("modules", False)
    assert "not compared" in str(plan)
    assert "pass example_inputs" in plan["1"].reason


def test_a_plan_for_modules_is_carried_out_where_it_fits(image: Tensor) -> None:
    plan = fxfact.plan(Branching(), example_inputs=image)
    loaded = fxfact.Plan.from_json(plan.to_json())
    assert loaded == plan
    assert fxfact.apply(loaded, Branching())(image).shape == (3, 5)

    class Other(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Conv2d(8, 14, 3)

    with pytest.raises(PlanError, match="second: the plan has"):
        fxfact.apply(plan, Other())


def test_what_a_transposed_stand_in_cannot_do_is_listed_and_refused(image: Tensor) -> None:
    class Resizing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 4, 3, stride=2)
            self.again = nn.ConvTranspose2d(4, 4, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.up(x if x.sum() > 1e9 else x + 1, output_size=(22, 22)))

    result = factorized(Resizing(), image)
    assert reasons(result) == {"up": "it is called with other arguments than one input"}
    with pytest.raises(ArgumentError, match="output_size"):
        result.again(image, output_size=(22, 22))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_and_memory_formats_carry_over(image: Tensor, dtype: torch.dtype) -> None:
    for kind in (Small, Branching):
        model = kind().to(dtype, memory_format=torch.channels_last)
        result = factorized(model, image.to(dtype))
        for parameter in result.parameters():
            assert parameter.dtype == dtype
            if parameter.ndim == 4:
                assert parameter.is_contiguous(memory_format=torch.channels_last)
    one = nn.Sequential(nn.Conv2d(4, 8, 3, padding="same", padding_mode="reflect"), nn.ConvTranspose2d(8, 4, 3))
    assert factorized(one.to(dtype), image[0].to(dtype))(image[0].to(dtype)).shape == (4, 12, 12)


# Hostile models


class Writing(Small):
    """Changes its own parameters in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        weight = self.second.weight
        if self.way == "data":
            weight.data.mul_(0.5)
        elif self.way == "no_grad":
            with torch.no_grad():
                weight.mul_(0.5)
        elif self.way == "new data":
            weight.data = weight.data * 0.5
        elif self.way == "new parameter":
            self.second.weight = nn.Parameter(weight * 0.5)
        elif self.way == "all":
            for parameter in self.parameters():
                parameter.data.mul_(0.5)
        elif self.way == "foreach":
            torch._foreach_mul_([p.data for p in self.parameters()], 0.5)
        elif self.way == "view":
            weight.detach()[0].zero_()
        return super().forward(x)


@pytest.mark.parametrize("way", ["data", "no_grad", "new data", "new parameter", "all", "foreach", "view"])
def test_hostile_a_model_that_writes_to_its_parameters_is_refused(image: Tensor, way: str) -> None:
    model = Writing(way)
    before, identities = states(model), [id(p) for p in model.parameters()]
    with pytest.raises(CaptureError, match=r"(first|second)\.\w+: forward changes this parameter"):
        fxfact.factorize(model, example_inputs=image)
    if way in ("data", "view"):  # the graph does it too, so the convolution is left alone
        result = fxfact.factorize(model, include=["second", "first"], rank=(8, 4), allow_growth=True)
        assert "also read by" in reasons(result)["second"]
    else:
        with pytest.raises(
            CaptureError, match=r"(forward (changes this|turns gradients off|sets the attr)|cannot assign)"
        ):
            fxfact.factorize(model)
    assert unchanged(model, before)
    assert [id(p) for p in model.parameters()] == identities


def test_a_model_that_takes_gradients_of_its_own(image: Tensor) -> None:
    class Score(Small):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(super().forward(x).square().sum(), x)[0]

    model = Score().eval()
    before = states(model)
    small = fxfact.factorize(model, "tucker", rank=0.5, example_inputs=image, verify=True)
    plan = fxfact.plan_of(small)
    plain = fxfact.plan(Small().eval(), "tucker", rank=0.5, example_inputs=image)
    assert [d.path for d in plan.rewrites] == [d.path for d in plain.rewrites]
    assert plan.rewrites
    assert plan.network.macs == (plain.network.macs or 0) + model.head.weight.numel()  # of gradients, those of `head`
    assert small(image).shape == model(image).shape
    assert unchanged(model, before)
    with pytest.raises(CalibrationError, match="gradients of its own, plan without data"):
        fxfact.calibrate(model, [image], likelihood="gaussian")


def test_hostile_a_model_that_reads_a_weight_that_it_also_convolves_with(image: Tensor) -> None:
    class Reads(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.second.weight.abs().mean()

    class ReadsAndBranches(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.second.weight.abs().mean()

    for model in (Reads().eval(), ReadsAndBranches().eval()):
        result = factorized(model, image)
        assert [d.path for d in fxfact.plan_of(result).rewrites] == ["first"]
        unseen = fxfact.factorize(model, capture="modules")  # nobody sees that it is read: then it is what it gives
        assert len(fxfact.plan_of(unseen).rewrites) == 2
        assert fxfact.verify(model, unseen, image).ok


# Bad input


def test_buffers_may_be_expanded(image: Tensor) -> None:
    class Centred(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor(0.5).expand(4, 1, 1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - self.mean)

    model = Centred().eval()
    assert fxfact.plan_of(factorized(model, image)).capture == "trace"
    program = torch.export.export(model, (image,))
    assert fxfact.plan_of(fxfact.factorize(program, "tucker", rank=0.5)).network.macs


def test_a_train_method_may_return_nothing(image: Tensor) -> None:
    class Silent(Small):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)

    class Untraced(Silent, Branching):
        pass

    for model in (Silent(), Untraced()):
        budget = fxfact.Latency(1.0)
        made = [factorized(model, image), fxfact.factorize(model, "tucker", budget=budget, example_inputs=image)]
        assert [network(image).shape for network in made] == [model(image).shape] * 2


def test_parameters_may_be_of_a_subclass(image: Tensor) -> None:
    class Own(nn.Parameter):
        pass

    class Headed(Small):
        def __init__(self) -> None:
            super().__init__()
            self.head.weight = Own(torch.randn(5, 12))

    model = Headed()
    result = factorized(model, image)
    assert fxfact.plan_of(result).capture == "trace"
    copied = result.get_submodule("head").weight
    assert type(copied) is Own
    assert copied is not model.head.weight
    fxfact.calibrate(model, [image])
    assert (model.head.weight.requires_grad, model.head.weight.grad) == (True, None)


def test_what_a_convolution_holds_besides_is_not_lost(image: Tensor) -> None:
    class Laden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
            self.one.gain = nn.Parameter(torch.rand(4, 1, 1))
            self.two.side = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x) * self.one.gain
            return self.two(x) + self.two.side(x)

    model = Laden()
    result = factorized(model, image)
    assert [decision.path for decision in fxfact.plan_of(result).rewrites] == ["one", "two.side"]
    assert result.one.gain.equal(model.one.gain)
    traced = fxfact.plan(model, capture="trace")
    assert "it holds modules or tensors of its own" in traced["one"].reason
    assert "it holds modules or tensors of its own" in traced["two"].reason


def test_models_that_cannot_be_compared_are_refused(image: Tensor) -> None:
    class Failing(Small):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("not today\nnor tomorrow")

    class Unsteady(Small):
        seen = random.Random(0)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + self.seen.random())

    with pytest.raises(CaptureError, match=r"Failing fails on example_inputs: not today\. Pass inputs"):
        fxfact.factorize(Failing(), example_inputs=image)
    with pytest.raises(CaptureError, match="two runs of Unsteady from one seed are not alike: its output differs"):
        fxfact.factorize(Unsteady(), example_inputs=image)


def test_sparse_quantized_and_complex_weights_are_listed(image: Tensor) -> None:
    sparse = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    sparse[0].weight = nn.Parameter(sparse[0].weight.detach().to_sparse())
    assert "sparse" in fxfact.plan(sparse)["0"].reason
    quantized = nn.Sequential(torch.ao.nn.quantized.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    assert "quantized" in fxfact.plan(quantized)["0"].reason
    assert len(fxfact.plan_of(fxfact.factorize(quantized)).rewrites) == 1
    plan = fxfact.plan(nn.Sequential(nn.Conv2d(4, 4, 3, dtype=torch.complex64)), example_inputs=image.to(torch.cfloat))
    assert "complex64" in plan["0"].reason

    class Sharded(torch.Tensor):
        pass

    sharded = nn.Sequential(nn.Conv2d(4, 4, 3))
    sharded[0].weight = nn.Parameter(torch.randn(4, 4, 3, 3).as_subclass(Sharded))
    assert fxfact.plan(sharded)["0"].reason == "its weight is a Sharded, not a plain tensor"


def test_wrappers_are_refused_with_the_way_out(small: Small) -> None:
    class FSDPSmall(Small):
        """What torch.distributed.fsdp.fully_shard makes of a class is called so."""

    for wrapped in (nn.DataParallel(small), torch.compile(small), FSDPSmall()):
        with pytest.raises(CaptureError, match="wraps the network: factorize what it wraps"):
            fxfact.factorize(wrapped)


def test_random_numbers_and_the_callers_inputs_are_left_alone(image: Tensor) -> None:
    class InPlace(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2)) + torch.rand(()) + random.random()

    model = InPlace()
    before, states_before = image.clone(), (torch.get_rng_state(), random.getstate())
    factorized(model, image)
    assert image.equal(before)
    assert torch.get_rng_state().equal(states_before[0])
    assert random.getstate() == states_before[1]


def test_a_network_on_the_meta_device_is_planned_without_being_run(image: Tensor) -> None:
    plan = fxfact.plan(Small().to("meta"), example_inputs=image.to("meta"))
    assert (len(plan.rewrites), plan.compared) == (2, False)
    assert plan.network.macs == capture(Small(), image).macs


@pytest.mark.parametrize("how", ["trace", "modules"])
def test_a_weight_that_forward_returns_stays(small: Small, image: Tensor, how: Any) -> None:
    class Returning(Small):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.second.weight

    model = Returning().eval()
    plan = fxfact.plan(model, rank=0.5, example_inputs=image, capture=how)
    assert [decision.path for decision in plan.rewrites] == ["first"]
    assert "is also" in plan["second"].reason


def test_a_stand_in_of_a_subclass_runs_in_several_threads_at_once(image: Tensor) -> None:
    meetings = [threading.Barrier(1)]

    class Meeting(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            meetings[-1].wait(timeout=60)
            output = F.conv2d(input, self.weight, self.bias, self.stride, self.padding)
            meetings[-1].wait(timeout=60)
            return output

    small = factorized(nn.Sequential(Meeting(4, 8, 3)), image, capture="modules")
    expected = small(image)
    meetings.append(threading.Barrier(2))
    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(small, [image] * 8):
            assert torch.equal(found, expected)


def test_threads_factorize_and_run_models_at_once(small: Small, image: Tensor) -> None:
    expected, whole, failed = small(image), threading.Event(), []
    call = nn.Module.__call__

    def serve() -> None:
        while not whole.is_set():
            if not torch.equal(small(image), expected):
                failed.append("another output")

    def factorize() -> None:
        for _ in range(3):
            made = fxfact.factorize(small, "tucker", rank=0.5, example_inputs=image)
            if len(fxfact.plan_of(made).rewrites) != 2 or fxfact.plan_of(made).capture != "trace":
                failed.append("another plan")

    with ThreadPoolExecutor(3) as threads:
        serving = threads.submit(serve)
        for done in [threads.submit(factorize) for _ in range(2)]:
            done.result()
        whole.set()
        serving.result()
    assert not failed
    assert nn.Module.__call__ is call
