"""The front end 'trace': what it accepts, what it refuses, and how often it traces."""

from __future__ import annotations

import copy
import cProfile
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, is_grad_enabled, nn
from torch import is_grad_enabled as gradients_are_on

import fxfact
from fxfact.capture import capture
from fxfact.errors import ArgumentError, CaptureError
from tests.support import Branching, Small, apart, factorized


def test_trace_captures_a_model_as_one_graph(small: Small, image: Tensor) -> None:
    result = factorized(small, image)
    plan = fxfact.plan_of(result)
    assert isinstance(result, fx.GraphModule)
    assert (plan.capture, plan.compared, plan.refused) == ("trace", True, ())
    assert "compared with the model on example inputs" in str(plan)


@pytest.mark.parametrize("name", ["own", "name", "leaves", "seed", "gradients", "given"])
def test_trace_accepts_optional_arguments_of_any_name(image: Tensor, name: str) -> None:
    """Names of arguments of fxfact's own functions are allowed."""
    models: dict[str, Any] = {}
    for use in ("x", f"x if {name} is None else -x"):
        exec(f"def forward(self, x, {name}=None): return Small.forward(self, {use})", globals(), models)
        model = type("Optional", (Small,), {"forward": models["forward"]})()
        assert fxfact.plan_of(factorized(model, image)).capture == ("trace" if use == "x" else "modules")


def test_trace_refuses_a_forward_that_depends_on_the_training_mode(image: Tensor) -> None:
    class Dropping(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5, training=self.training))

    for mode in (True, False):
        model = Dropping().train(mode)
        result = factorized(model, image)
        assert "self.training" in fxfact.plan_of(result).refused[0]
        assert not result.train()(image).equal(result(image))
        assert result.eval()(image).equal(result(image))


def test_trace_refuses_a_forward_that_turns_gradients_off(image: Tensor) -> None:
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


def test_trace_refuses_a_forward_that_changes_a_buffer(image: Tensor) -> None:
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


def test_trace_refuses_hooks_on_modules_that_it_traces_into(small: Small, image: Tensor) -> None:
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


def test_trace_leaves_the_attributes_and_buffers_of_the_model_as_they_are(image: Tensor) -> None:
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


def test_trace_keeps_leaf_modules_whole(image: Tensor) -> None:
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


def test_trace_accepts_expanded_buffers(image: Tensor) -> None:
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


def test_trace_keeps_the_class_of_parameters(image: Tensor) -> None:
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


def test_trace_accepts_containers_and_variadic_arguments(image: Tensor) -> None:
    class Containers(Small):
        def forward(self, xs: list[Tensor], scale: dict[str, Tensor]) -> Tensor:
            return super().forward(xs[0] + xs[1]) * scale["by"]

    class Many(Small):
        def forward(self, *xs: Tensor) -> Tensor:
            return super().forward(xs[0] + xs[1])

    inputs = ([image, image], {"by": torch.ones(())})
    assert fxfact.factorize(Containers(), example_inputs=inputs, verify=True)(*inputs).shape == (3, 5)
    assert fxfact.plan(Many(), example_inputs=(image, image)).network.macs == capture(Small(), image).macs


def test_trace_runs_in_several_threads_while_others_run_models(small: Small, image: Tensor) -> None:
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


# What forward reads while it is traced: whether modules are in training mode, gradients are on, autocast is on.


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class of every model that torch.fx traces."""
    traced: list[str] = []
    trace = fx.Tracer.trace

    def counting(self: fx.Tracer, root: Any, concrete_args: Any = None) -> fx.Graph:
        traced.append(type(root).__name__)
        return trace(self, root, concrete_args)

    monkeypatch.setattr(fx.Tracer, "trace", counting)
    return traced


def outcome(condition: Callable[[nn.Module], Any], *, matters: bool, training: bool = False) -> str:
    """Capture a model that asks ``condition(self)``; why it is refused, or "". The answer changes it or does not."""

    class Asking(Small):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * 2 if condition(self) and matters else y

    try:
        network = capture(Asking().train(training), how="trace").network
    except CaptureError as error:
        return str(error)
    assert isinstance(network, fx.GraphModule)
    return ""


@pytest.mark.parametrize("training", [True, False])
def test_trace_runs_twice_if_forward_reads_no_setting(traces: list[str], image: Tensor, training: bool) -> None:
    for inputs in (None, image):
        traces.clear()
        assert capture(Small().train(training), inputs).frontend == "trace"
        assert len(traces) == 2


def test_trace_runs_in_both_modes_if_the_modules_of_the_model_are_in_both(traces: list[str]) -> None:
    model = Small().train()
    model.norm.eval()
    capture(model)
    assert len(traces) == 3

    class BothTraining(Small):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * 2 if self.first.training and self.norm.training else y

    model = BothTraining().train()
    model.norm.eval()
    with pytest.raises(CaptureError, match=r"self\.training"):
        capture(model)


@pytest.mark.parametrize("training", [True, False])
def test_trace_notices_that_the_training_mode_is_read(traces: list[str], training: bool) -> None:
    def condition(model: nn.Module) -> bool:
        return model.training

    assert outcome(condition, matters=False, training=training) == ""
    assert len(traces) == 2
    assert "self.training" in outcome(condition, matters=True, training=training)


AUTOCAST: dict[str, Callable[[], bool]] = {
    "is_autocast_enabled": lambda: torch.is_autocast_enabled("cpu"),
    "of any device": torch._C._is_any_autocast_enabled,
}
GRADIENTS: dict[str, Callable[[], bool]] = {
    "is_grad_enabled": lambda: torch.is_grad_enabled() is True,
    "imported by name": lambda: is_grad_enabled() is True,
    "imported by another name": lambda: gradients_are_on() is True,
    "as an object": is_grad_enabled,
    "results of operators": lambda: (torch.ones(1, requires_grad=True) * 2).requires_grad,
}


@pytest.mark.parametrize("how", GRADIENTS)
@pytest.mark.parametrize("training", [True, False])
def test_trace_notices_that_gradients_are_read(traces: list[str], how: str, training: bool) -> None:
    ask = GRADIENTS[how]
    assert outcome(lambda model: ask(), matters=False, training=training) == ""
    assert len(traces) == 5
    assert "torch.is_grad_enabled()" in outcome(lambda model: ask(), matters=True, training=training)
    for mode in (True, False):
        words = outcome(lambda model, mode=mode: model.training == mode and ask(), matters=True, training=training)
        assert "torch.is_grad_enabled()" in words


@pytest.mark.parametrize("how", AUTOCAST)
def test_trace_notices_that_gradients_and_autocast_are_read(traces: list[str], how: str) -> None:
    ask = AUTOCAST[how]
    assert outcome(lambda model: ask(), matters=False) == ""
    assert len(traces) == 5
    assert "torch.is_autocast_enabled()" in outcome(lambda model: ask(), matters=True)
    for condition in (
        lambda model: is_grad_enabled() and ask(),
        lambda model: is_grad_enabled() == ask(),
        lambda model: ask() and is_grad_enabled() and not model.training,
    ):
        assert "_enabled()" in outcome(condition, matters=True)


def test_trace_notices_what_inner_modules_and_attributes_read(traces: list[str]) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ask = torch.is_grad_enabled

        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.training and self.ask() else x

    for training in (True, False):
        with pytest.raises(CaptureError, match=r"torch\.is_grad_enabled\(\)"):
            capture(nn.Sequential(Small(), nn.Sequential(Inner())).train(training))


def test_trace_ignores_what_leaf_modules_torch_and_other_threads_read(traces: list[str]) -> None:
    class Usual(Small):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.first(x)))
            x = self.drop(self.second(x)).flatten(2).mT
            x = self.attention(x, x, x)[0] * torch.tensor(2.0)
            x = x + torch.arange(3).sum() + torch.zeros(1)
            return self.head(F.softmax(x, -1).mean(1))

    finished = threading.Event()

    def ask() -> None:
        while not finished.is_set():
            torch.is_grad_enabled()
            torch.is_autocast_enabled("cpu")

    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(ask)
        try:
            capture(Usual())
        finally:
            finished.set()
        asking.result()
    assert len(traces) == 2


def test_trace_leaves_the_profiler_of_the_caller_in_place(traces: list[str]) -> None:
    asked: list[str] = []

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "c_call" and argument is is_grad_enabled:
            asked.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        assert outcome(lambda model: is_grad_enabled(), matters=False) == ""
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert "<lambda>" in asked
    traces.clear()
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        assert "is_grad_enabled" in outcome(lambda model: is_grad_enabled() and model.training, matters=True)
    finally:
        profiler.disable()
    profiler.create_stats()
    assert any(function == "_run_tracer" for _, _, function in profiler.stats)


def test_trace_accepts_numbers_that_forward_computes_whatever_their_dtype_under_autocast(image: Tensor) -> None:
    class Computing(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (torch.ones(2, 2) @ torch.ones(2, 2)).sum()

    assert fxfact.plan_of(factorized(Computing(), image)).capture == "trace"


NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: x.shape[2],
    "size": lambda x: x.size(-1),
    "all sizes": lambda x: x.size()[0],
    "ndim": lambda x: x.ndim,
    "numel": lambda x: x.numel(),
    "computed": lambda x: x.shape[2] // 2 * -x.dim(),
    "an item": lambda x: x.sum().item(),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_trace_accepts_augmented_assignments_to_numbers(image: Tensor, name: str) -> None:
    class Counting(Small):
        def forward(self, x: Tensor, scale: int) -> Tensor:
            n = before = NUMBERS[name](x)
            n += 1
            n *= 2
            n -= scale
            scale += 1
            return super().forward(x) * (n / 100) + before / 100

    inputs, model = (image, 2), Counting().eval()
    result = factorized(model, inputs, capture="trace")
    expected = factorized(model, inputs, capture="modules")(*inputs)
    assert result(*inputs).allclose(expected, atol=1e-4, rtol=1e-4)


def test_trace_refuses_augmented_assignments_to_tensors_with_two_names(image: Tensor) -> None:
    for change in (lambda x: x, lambda x: x[0], lambda x: x.shape[1] * x, lambda x: x.view(x.shape)):

        class Writing(Small):
            way = staticmethod(change)

            def forward(self, x: Tensor) -> Tensor:
                y = super().forward(x)
                z = before = self.way(y)
                z += 1
                return y.sum() + before

        with pytest.raises(CaptureError, match="in place and then uses it under another name"):
            fxfact.plan(Writing(), capture="trace")


def test_trace_starts_every_time_from_the_state_of_the_model(image: Tensor) -> None:
    class Caching(Small):
        def __init__(self) -> None:
            super().__init__()
            self.scales: list[Tensor] = []
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if not self.scales:
                self.scales.append(torch.tensor(2.0))
            return super().forward(x) * self.scales[0] * self.calls

    model = Caching().eval()
    expected = copy.deepcopy(model)(image)
    for inputs in (None, image):
        network = copy.deepcopy(capture(model, inputs).network)
        assert isinstance(network, fx.GraphModule) == (inputs is None)  # the second run of the model is another
        assert apart(expected, network(image)) < 1e-6
    assert (model.scales, model.calls) == ([], 0)
