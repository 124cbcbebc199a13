"""A private copy is used again only while it is in the state of the model."""

from __future__ import annotations

import functools
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from fxfact.capture import capture
from fxfact.capture.guards import PrivateCopy, state_of
from fxfact.utils import alias_copy
from tests.support import Small, apart


class Holding(Small):
    """Has attributes of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))
        self.plain = torch.ones(2)
        self.number, self.name, self.nothing = 3, "three", None
        self.numbers, self.pair, self.names = [1, [2.0]], (1, torch.zeros(1)), {"a"}
        self.by_key: dict[str, Any] = {"inner": {"value": 1}}
        self.ordered, self.queue = OrderedDict(a=[1]), deque([1, 2])
        self.config = SimpleNamespace(size=(1, 2), options={"deep": [1]})
        self.array, self.generator = np.zeros(3), random.Random(0)
        self.call, self.act = functools.partial(max, [1]), torch.relu
        self.dtype = torch.float32


def add_hook(model: Any) -> None:
    model.first.register_forward_hook(lambda module, args, output: output)


def add_gradient(model: Any) -> None:
    model.first.weight.grad = torch.ones_like(model.first.weight)


def replace_module(model: Any) -> None:
    model.norm = nn.BatchNorm2d(8)


def replace_memory(model: Any) -> None:
    model.first.weight.data = model.first.weight.data.clone()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda model: setattr(model, "number", 4),
    "type of an attribute": lambda model: setattr(model, "number", 3.0),
    "new attribute": lambda model: setattr(model, "new", 1),
    "deleted attribute": lambda model: delattr(model, "name"),
    "training mode": lambda model: model.norm.eval(),
    "buffer": lambda model: model.count.add_(1),
    "plain tensor": lambda model: model.plain.mul_(1),
    "new tensor": lambda model: setattr(model, "plain", model.plain.clone()),
    "tensor in a tuple": lambda model: model.pair[1].add_(1),
    "list": lambda model: model.numbers[1].append(1),
    "order of a list": lambda model: setattr(model, "numbers", [[2.0], 1]),
    "set": lambda model: model.names.add("b"),
    "dict": lambda model: model.by_key["inner"].update(value=2),
    "ordered dict": lambda model: model.ordered["a"].append(2),
    "deque": lambda model: model.queue.popleft(),
    "object": lambda model: model.config.options["deep"].append(2),
    "attribute of an object": lambda model: setattr(model.config, "size", (2, 1)),
    "array": lambda model: model.array.fill(1),
    "random number generator": lambda model: model.generator.random(),
    "partial": lambda model: model.call.args[0].append(2),
    "hook": add_hook,
    "gradient": add_gradient,
    "module": replace_module,
    "memory of a parameter": replace_memory,
    "requires_grad": lambda model: model.first.weight.requires_grad_(False),
    "attribute of a parameter": lambda model: setattr(model.first.weight, "mark", 1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_private_copy_is_made_again_after_a_change(what: str) -> None:
    model = Holding()
    copies = PrivateCopy(lambda: alias_copy(model))
    network = copies.get()
    assert network is not model
    assert copies.get() is network
    CHANGES[what](network)
    again = copies.get()
    assert again is not network
    assert copies.get() is again


def test_private_copy_is_used_again_after_a_run_that_changes_nothing(image: Tensor) -> None:
    model = Holding().eval()
    copies = PrivateCopy(lambda: alias_copy(model))
    network = copies.get()
    network(image)
    assert copies.get() is network


def test_private_copy_is_never_used_again_if_its_state_is_unknown(image: Tensor) -> None:
    class Unknown:
        def __deepcopy__(self, memo: dict[int, Any]) -> Unknown:
            return self

    graph_module = fx.symbolic_trace(Small())
    scripted = nn.Sequential(torch.jit.script(nn.ReLU()))
    own_rules, locked = Small(), Small()
    own_rules.value, locked.lock = Unknown(), threading.Lock()
    for model in (graph_module, scripted, own_rules, locked):
        assert state_of(model) is None
    copies = PrivateCopy(lambda: alias_copy(own_rules))
    assert copies.get() is not copies.get()


def test_private_copy_that_was_taken_is_not_returned_again() -> None:
    model = Small()
    copies = PrivateCopy(lambda: alias_copy(model))
    first = copies.get()
    assert copies.take() is first
    second = copies.get()
    assert second is not first
    copies.discard()
    assert copies.get() is not second


def test_state_follows_objects_that_refer_to_each_other() -> None:
    model = Small()
    model.config = SimpleNamespace(owner=model)
    model.config.itself = model.config
    assert state_of(model) == state_of(model)


def test_capture_copies_a_usual_model_once(image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[nn.Module] = []

    def counting(model: nn.Module) -> nn.Module:
        made.append(alias_copy(model))
        return made[-1]

    monkeypatch.setattr("fxfact.capture.select.alias_copy", counting)
    monkeypatch.setattr("fxfact.capture.equivalence.copy_structure", lambda network: pytest.fail("copied again"))
    for inputs in (None, image):
        made.clear()
        assert capture(Small().eval(), inputs).frontend == "trace"
        assert len(made) == 1


@pytest.mark.parametrize("how", ["trace", "modules"])
def test_captured_network_is_in_the_state_of_the_model(image: Tensor, how: Any) -> None:
    class Counting(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.calls: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(len(self.calls))
            return super().forward(x)

    model = Counting().train()
    model.first.eval()
    network: Any = capture(model, image, how=how).network
    assert model.calls == []
    assert [module.training for module in network.modules()][:2] == [True, False]
    assert apart(model.eval()(image), network.eval()(image)) < 1e-6
    if how == "modules":
        assert network.calls == [0]
