"""Resumed runs: they run every node once, and modules get the same inputs as in runs from the beginning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxfact
from fxfact.finetune import resumable_run
from fxfact.finetune.resumable_run import ResumableRun
from tests.support import Small


class Branched(nn.Module):
    """Has in-place writes, a residual connection, and a module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, shift: float = 0.5) -> Tensor:
        x = x.add_(shift)
        y = self.second(self.first(x).relu_())
        y += x
        return self.head(self.last(self.second(y).relu_()).mean((2, 3)))


class Drawing(Branched):
    """Draws random numbers between its convolutions."""

    def forward(self, x: Tensor, shift: float = 0.5) -> Tensor:
        y = self.second(F.dropout(self.first(x), training=True))
        return self.head(self.last(y + torch.randn_like(y)).mean((2, 3)))


@pytest.fixture
def batches() -> list[Tensor]:
    return list(torch.randn(12, 4, 6, 6, generator=torch.Generator().manual_seed(0)).split(4))


def count_calls(network: nn.Module) -> Counter[str]:
    """Count how often each module is called from now on."""
    calls: Counter[str] = Counter()
    for name, module in network.named_children():
        module.register_forward_hook(lambda m, args, output, name=name: calls.update([name]))
    return calls


def inputs_at(network: nn.Module, batches: Any, stops: list[str]) -> dict[str, list[Tensor]]:
    """Return the inputs of each module. Its weight is changed after all batches have reached it."""
    run, inputs = ResumableRun(network, batches), dict[str, list[Tensor]]()
    for name in stops:
        own: list[Tensor] = inputs.setdefault(name, [])

        def on_input(maps: Tensor, own: list[Tensor] = own) -> bool:
            own.append(maps.clone())
            return True

        module: Any = network.get_submodule(name)
        assert all(run.run_until(number, module, on_input) for number in range(len(batches)))
        module.weight.mul_(1.5)
    return inputs


@pytest.mark.parametrize("kind", [Branched, Drawing])
@pytest.mark.parametrize("max_bytes", [0, 700, 1 << 20])  # enough for no batch, for one, for all
@torch.no_grad()
def test_resumed_runs_get_the_same_inputs_as_runs_from_the_beginning(
    kind: Callable[[], nn.Module], max_bytes: int, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    stops = ["first", "second", "last"]
    expected = inputs_at(model, batches, stops)  # no graph module, so nothing is resumed
    for name in stops:
        model.get_submodule(name).weight.div_(1.5)
    monkeypatch.setattr(resumable_run, "_MAX_BYTES", max_bytes)
    found = inputs_at(fx.symbolic_trace(model), batches, stops)
    assert all(torch.equal(a, b) for name in stops for a, b in zip(expected[name], found[name], strict=True))


@torch.no_grad()
def test_every_node_runs_once_if_values_fit_into_memory(batches: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(4)))
    for max_bytes, times in ((1 << 20, (3, 3, 3)), (0, (9, 6, 3))):
        monkeypatch.setattr(resumable_run, "_MAX_BYTES", max_bytes)
        graph = fx.symbolic_trace(model)
        calls = count_calls(graph)
        inputs_at(graph, batches, ["1", "2", "3"])
        assert tuple(calls[name] for name in "012") == times
        assert calls["3"] == 0


@torch.no_grad()
def test_run_to_an_earlier_module_starts_again_and_uncalled_modules_are_not_reached(batches: list[Tensor]) -> None:
    graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)).eval())
    run, inputs = ResumableRun(graph, batches), list[Tensor]()
    for name in ("1", "0"):
        assert run.run_until(0, graph.get_submodule(name), lambda maps: inputs.append(maps) or True)  # type: ignore[func-returns-value]
    assert torch.equal(inputs[1], batches[0])
    assert not run.run_until(0, graph.get_submodule("1"), lambda maps: False)
    assert not run.run_until(0, nn.Conv2d(4, 4, 1), lambda maps: True)


@pytest.mark.parametrize(
    "as_batches", [lambda x: {"shift": 0.1, "x": x}, lambda x: (x, 0.1)], ids=["keywords", "positions"]
)
def test_refit_does_not_depend_on_the_memory_for_resumed_runs(as_batches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Branched().eval(), torch.randn(32, 4, 10, 10)
    data = [as_batches(part) for part in x.split(8)]
    small = fxfact.factorize(model, "tucker", rank=0.5, example_inputs=data[0], capture="trace")
    assert isinstance(small, fx.GraphModule)
    one, report = fxfact.refit(small, model, data)
    monkeypatch.setattr(resumable_run, "_MAX_BYTES", 0)
    other, _ = fxfact.refit(small, model, data)
    assert report.paths == ("first", "second", "last")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@torch.no_grad()
def test_graph_that_changes_the_gradient_mode_runs_from_the_beginning(small: Small, batches: list[Tensor]) -> None:
    graph = fx.symbolic_trace(small)
    (body,) = [node for node in graph.graph.nodes if node.target == "second"]
    with graph.graph.inserting_before(body):
        graph.graph.call_function(torch._C._set_grad_enabled, (False,))
    graph.recompile()
    calls = count_calls(graph)
    x = torch.randn(2, 4, 10, 10)
    run = ResumableRun(graph, [x])
    for name in ("first", "second"):
        assert run.run_until(0, graph.get_submodule(name), lambda maps: True)
    assert calls["first"] == 1
