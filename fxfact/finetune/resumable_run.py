"""Runs of a network over batches that stop at a module, and go on from there once all of them have come to it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxfact.calibration import batch_call
from fxfact.capture import ExampleInputs

_ROOM = 1 << 30  # bytes for what stopped runs still need
_LASTING = {  # what changes how all runs go on
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    torch._C._set_grad_enabled,
}


class _StopRun(BaseException):
    """The run may end here. (No Exception: graph modules print those.)"""


class _Checkpoint(NamedTuple):
    """The node before which a run was stopped, by its number, the values that it still needs, and their bytes."""

    place: int
    values: dict[fx.Node, Any]
    size: int


class ResumableRun:
    """The runs of one network. Of a graph they go on from where they stopped, as far as there is room for what they
    need; all others begin anew. Weights may be changed in between, of modules that are called from there on.
    """

    def __init__(self, network: nn.Module, batches: Sequence[ExampleInputs]) -> None:
        self._network, self._batches = network, batches
        self._graph = _Graph(network) if isinstance(network, fx.GraphModule) and _can_pause(network) else None
        self._stops: dict[int, _Checkpoint] = {}

    def run_until(self, number: int, module: nn.Module, on_input: Callable[[Tensor], bool]) -> bool:
        """Run a batch, and ``on_input`` what ``module`` is given at every call, until that says that it has seen enough;
        whether it did. Raises CalibrationError.
        """

        def before(module: nn.Module, args: Any) -> None:
            if on_input(args[0]):
                raise _StopRun

        handle = module.register_forward_pre_hook(before)
        try:
            with batch_call(self._network, self._batches[number]) as (args, kwargs):
                if self._graph is None or module not in self._graph.places:
                    self._network(*args, **kwargs)
                else:
                    self._go_on(self._graph, number, module, self._graph.values(args, kwargs))
        except _StopRun:
            return True
        finally:
            handle.remove()
        return False

    def _go_on(self, graph: _Graph, number: int, module: nn.Module, given: dict[fx.Node, Any]) -> None:
        stop = self._stops.pop(number, None)
        if stop is None or stop.place > graph.places[module]:
            stop = _Checkpoint(0, given, 0)
        seeded, place = _random_states(), stop.place
        try:
            for place in range(stop.place, len(graph.nodes)):
                graph.run(graph.nodes[place], stop.values)
        except _StopRun:
            size, held = graph.size(stop.values), sum(other.size for other in self._stops.values())
            drawn = not all(map(torch.equal, seeded, _random_states()))
            if place == graph.places[module] and not drawn and held + size <= _ROOM:
                self._stops[number] = _Checkpoint(place, stop.values, size)
            raise


class _Graph:
    """A graph module, run node by node. ``places`` has the number of the node that calls a module, of those that are
    called by one alone.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        self.nodes = list(network.graph.nodes)
        calls = [(k, network.get_submodule(n.target)) for k, n in enumerate(self.nodes) if n.op == "call_module"]
        count = Counter(module for _, module in calls)
        self.places = {module: k for k, module in calls if count[module] == 1}
        self._signature = inspect.signature(network.forward)
        self._interpreter = fx.Interpreter(network)
        self._own = {t.untyped_storage().data_ptr() for t in chain(network.parameters(), network.buffers())}

    def values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[fx.Node, Any]:
        """What the placeholders stand for."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return {node: bound.arguments[node.target] for node in self.nodes if node.op == "placeholder"}

    def run(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Add the value of a node, and drop those that were needed for it alone."""
        self._interpreter.env = values
        if node.op != "placeholder":
            values[node] = self._interpreter.run_node(node)
        for done in self._interpreter.user_to_last_uses.get(node, ()):
            del values[done]

    def size(self, values: dict[fx.Node, Any]) -> int:
        """Bytes, without those of the network's own tensors."""
        tensors = [leaf for leaf in tree_leaves(list(values.values())) if isinstance(leaf, Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(size for pointer, size in storages.items() if pointer not in self._own)


def _random_states() -> list[Tensor]:
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *on_gpus]


def _can_pause(network: fx.GraphModule) -> bool:
    """Whether a run is the nodes one after the other, of arguments by name, and leaves nothing behind."""
    names = {node.target for node in network.graph.nodes if node.op == "placeholder"}
    known = names <= inspect.signature(network.forward).parameters.keys()
    lasting = any(node.target in _LASTING for node in network.graph.nodes)
    return known and not lasting and not network._forward_pre_hooks
