"""The laws of a pass on graph modules, as a test class to inherit from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import fxfact
from fxfact.capture import capture
from fxfact.errors import GraphError
from fxfact.passes import PassRecord, pass_history, set_history
from tests.support import copied_state


class Foldable(nn.Module):
    """Convolutions with batch norms after them, consecutive 1×1 convolutions, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.one, self.other = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)
        self.last, self.head = nn.Conv2d(4, 8, 3, stride=2), nn.Linear(8, 5)
        for tensor in (self.norm.running_mean, self.norm.running_var, self.norm.weight.data):
            tensor.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.last(self.other(self.one(x)))).mean((2, 3)))


class NothingToDo(nn.Module):
    """No layer that a pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x))


def modules_and_code(graph_module: fx.GraphModule) -> tuple[dict[str, tuple[type, int, bool]], str]:
    """What a pass may not change in its argument, besides values and meta."""
    modules = {path: (type(module), id(module), module.training) for path, module in graph_module.named_modules()}
    return modules, graph_module.code


class PassLaws:
    """Inherit from this class, and say how the pass is made for a model. All laws become tests of your class."""

    def make(self, model: nn.Module, inputs: Tensor) -> PassBase:
        raise NotImplementedError

    def make_model(self) -> nn.Module:
        """Make a model that the pass changes, in evaluation mode."""
        return Foldable().double().eval()

    def make_inputs(self) -> Tensor:
        return torch.randn(2, 3, 9, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    @pytest.fixture
    def inputs(self) -> Tensor:
        return self.make_inputs()

    @pytest.fixture
    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make_model()

    @pytest.fixture
    def graph_module(self, model: nn.Module, inputs: Tensor) -> fx.GraphModule:
        network = capture(model, inputs, how="trace").network
        assert isinstance(network, fx.GraphModule)
        return network

    @pytest.fixture
    def run(self, model: nn.Module, inputs: Tensor) -> Callable[[fx.GraphModule], PassResult]:
        """Runs a pass for the model on a graph module."""

        def run_pass(graph_module: fx.GraphModule) -> PassResult:
            result = self.make(model, inputs)(graph_module)
            assert result is not None
            return result

        return run_pass

    def test_pass_leaves_its_argument_unchanged(self, graph_module: fx.GraphModule, run: Any) -> None:
        before, state = modules_and_code(graph_module), copied_state(graph_module)
        parameters = {name: id(parameter) for name, parameter in graph_module.named_parameters()}
        meta = {node.name: dict(node.meta) for node in graph_module.graph.nodes}
        history = pass_history(graph_module)
        result = run(graph_module)
        assert result.modified
        assert modules_and_code(graph_module) == before
        assert all(torch.equal(value, state[name]) for name, value in graph_module.state_dict().items())
        assert {name: id(parameter) for name, parameter in graph_module.named_parameters()} == parameters
        assert {node.name: dict(node.meta) for node in graph_module.graph.nodes} == meta
        assert pass_history(graph_module) == history
        graph_module.graph.lint()

    def test_pass_that_modified_something_returns_another_module(self, graph_module: fx.GraphModule, run: Any) -> None:
        result = run(graph_module)
        assert result.modified
        assert isinstance(result.graph_module, fx.GraphModule)
        assert result.graph_module is not graph_module
        state, other = graph_module.state_dict(), result.graph_module.state_dict()
        types, found = (
            {path: type(module) for path, module in each.named_modules()}
            for each in (graph_module, result.graph_module)
        )
        same_layout = state.keys() == other.keys() and all(
            value.stride() == other[name].stride() and value.shape == other[name].shape for name, value in state.items()
        )
        assert not (same_layout and types == found and graph_module.code == result.graph_module.code)

    def test_pass_that_modified_nothing_returns_the_module_itself(self) -> None:
        model, inputs = NothingToDo().eval(), torch.randn(2, 10)
        network = capture(model, inputs, how="trace").network
        assert isinstance(network, fx.GraphModule)
        result = self.make(model, inputs)(network)
        assert result is not None
        assert not result.modified
        assert result.graph_module is network

    def test_second_run_changes_nothing(self, graph_module: fx.GraphModule, run: Any) -> None:
        first = run(graph_module).graph_module
        state = copied_state(first)
        again = run(first)
        assert not again.modified
        assert again.graph_module is first
        assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())

    def test_outputs_stay_the_same(self, graph_module: fx.GraphModule, inputs: Tensor, run: Any) -> None:
        expected = graph_module(inputs)
        torch.testing.assert_close(run(graph_module).graph_module(inputs), expected, rtol=1e-9, atol=1e-9)

    def test_pass_checks_the_graph_before_and_after(
        self, graph_module: fx.GraphModule, run: Any, model: nn.Module, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = self.make(model, inputs)
        module, occasions = sys.modules[type(made).call.__module__], list[str]()
        check = module.check_invariants  # type: ignore[attr-defined]

        def recording_check(graph: fx.GraphModule, when: str, *args: Any, **options: Any) -> None:
            occasions.append(when)
            check(graph, when, *args, **options)

        monkeypatch.setattr(module, "check_invariants", recording_check)
        made(graph_module)
        name = type(made).__name__
        assert occasions == [f"before {name}", f"after {name}"]

    def test_pass_refuses_a_graph_that_was_not_recompiled(self, graph_module: fx.GraphModule, run: Any) -> None:
        output = next(iter(reversed(graph_module.graph.nodes)))
        with graph_module.graph.inserting_before(output):
            output.args = (graph_module.graph.call_function(torch.neg, output.args),)
        with pytest.raises(GraphError, match=r"^before \w+: the graph was changed but not recompiled"):
            run(graph_module)

    def test_result_is_recompiled_well_formed_and_has_shapes(self, graph_module: fx.GraphModule, run: Any) -> None:
        result = run(graph_module).graph_module
        result.graph.lint()
        assert result.graph.python_code("self").src == result.code
        assert all("tensor_meta" in node.meta for node in graph_module.graph.nodes if node.op != "output")
        assert all("tensor_meta" in node.meta for node in result.graph.nodes if node.op != "output")

    def test_pass_keeps_the_history(self, graph_module: fx.GraphModule, inputs: Tensor, run: Any) -> None:
        record = PassRecord(fxfact.plan(graph_module, exclude="*", example_inputs=inputs), {})
        set_history(graph_module, (record,))
        result = run(graph_module)
        assert result.modified
        assert pass_history(result.graph_module)[:1] == (record,)
        assert pass_history(graph_module) == (record,)

    def test_pass_keeps_the_meta_of_users(self, graph_module: fx.GraphModule, run: Any) -> None:
        graph_module.meta["mine"] = "kept"
        for node in graph_module.graph.nodes:
            node.meta["mine"] = node.name
        result = run(graph_module).graph_module
        assert result.meta["mine"] == "kept"
        names = {node.name for node in graph_module.graph.nodes}
        kept = [node for node in result.graph.nodes if node.name in names]
        assert len(kept) > 3
        assert all(node.meta.get("mine") == node.name for node in kept)

    def test_pass_keeps_modes_and_requires_grad(self, graph_module: fx.GraphModule, run: Any) -> None:
        first, *_, last = graph_module.parameters()
        for parameter in (first, last):
            parameter.requires_grad_(requires_grad=False)
        result = run(graph_module).graph_module
        training = {path: module.training for path, module in graph_module.named_modules()}
        assert all(training.get(path, False) == module.training for path, module in result.named_modules())
        before = dict(graph_module.named_parameters())
        unchanged = [
            (before[name], parameter)
            for name, parameter in result.named_parameters()
            if name in before and before[name].shape == parameter.shape and torch.equal(before[name], parameter)
        ]
        assert unchanged
        assert all(one.requires_grad == other.requires_grad for one, other in unchanged)
