"""Runs a network over batches up to a module, and resumes the runs from there."""

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
from fxfact.utils import plain_tensors_of, storages_of

_MAX_BYTES = 1 << 30  # for the values that stopped runs still need
_CONTEXT_CALLS = {  # each of them changes how the rest of the run computes
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    torch._C._set_grad_enabled,
}


class _StopRun(BaseException):
    """Raised to end a run. It is no Exception, because graph modules print exceptions."""


class _Checkpoint(NamedTuple):
    """A stopped run: the number of the node before which it stopped, the values still needed, and their bytes."""

    node_number: int
    values: dict[fx.Node, Any]
    size: int


class ResumableRun:
    """Runs of one network over fixed batches, each of which can be stopped at a module and resumed later.

    Runs of a graph module are resumed while the values that they need fit into 1 GiB. All others start again from the
    beginning. Between runs you may change the weights of modules that are called from there on.
    """

    def __init__(self, network: nn.Module, batches: Sequence[ExampleInputs]) -> None:
        self._network, self._batches = network, batches
        self._graph = _NodeRunner(network) if isinstance(network, fx.GraphModule) and _can_resume(network) else None
        self._checkpoints: dict[int, _Checkpoint] = {}

    def run_until(self, number: int, module: nn.Module, on_input: Callable[[Tensor], bool]) -> bool:
        """Run batch ``number`` and pass every input of ``module`` to ``on_input``, until that returns True.

        Returns whether ``on_input`` returned True. Raises CalibrationError.
        """

        def before_call(module: nn.Module, args: Any) -> None:
            if on_input(args[0]):
                raise _StopRun

        handle = module.register_forward_pre_hook(before_call)
        try:
            with batch_call(self._network, self._batches[number]) as (args, kwargs):
                if self._graph is None or module not in self._graph.call_number:
                    self._network(*args, **kwargs)
                else:
                    self._resume(self._graph, number, module, self._graph.placeholder_values(args, kwargs))
        except _StopRun:
            return True
        finally:
            handle.remove()
        return False

    def _resume(self, graph: _NodeRunner, number: int, module: nn.Module, inputs: dict[fx.Node, Any]) -> None:
        """Run from the checkpoint of a batch, or from the beginning if the checkpoint is after the module."""
        checkpoint = self._checkpoints.pop(number, None)
        if checkpoint is None or checkpoint.node_number > graph.call_number[module]:
            checkpoint = _Checkpoint(0, inputs, 0)
        random_states, k = _random_states(), checkpoint.node_number
        try:
            for k in range(checkpoint.node_number, len(graph.nodes)):
                graph.run_node(graph.nodes[k], checkpoint.values)
        except _StopRun:
            size = graph.size(checkpoint.values)
            held = sum(other.size for other in self._checkpoints.values())
            used_random = not all(map(torch.equal, random_states, _random_states()))
            if k == graph.call_number[module] and not used_random and held + size <= _MAX_BYTES:
                self._checkpoints[number] = _Checkpoint(k, checkpoint.values, size)
            raise


class _NodeRunner:
    """Runs a graph module node by node.

    ``call_number`` has the number of the node that calls a module, for modules that exactly one node calls.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        self.nodes = list(network.graph.nodes)
        calls = [(k, network.get_submodule(n.target)) for k, n in enumerate(self.nodes) if n.op == "call_module"]
        count = Counter(module for _, module in calls)
        self.call_number = {module: k for k, module in calls if count[module] == 1}
        self._signature = inspect.signature(network.forward)
        self._interpreter = fx.Interpreter(network)
        self._own = {id_ for t in chain(network.parameters(), network.buffers()) for id_ in storages_of(t)}

    def placeholder_values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[fx.Node, Any]:
        """Return the value of each placeholder."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return {node: bound.arguments[node.target] for node in self.nodes if node.op == "placeholder"}

    def run_node(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Compute the value of a node, and drop the values that no later node needs."""
        self._interpreter.env = values
        if node.op != "placeholder":
            values[node] = self._interpreter.run_node(node)
        for done in self._interpreter.user_to_last_uses.get(node, ()):
            del values[done]

    def size(self, values: dict[fx.Node, Any]) -> int:
        """Return the bytes of the values, without the network's own tensors."""
        leaves = [leaf for leaf in tree_leaves(list(values.values())) if isinstance(leaf, Tensor)]
        sizes = {id_: t.untyped_storage().nbytes() for t in plain_tensors_of(leaves) for id_ in storages_of(t)}
        return sum(size for id_, size in sizes.items() if id_ not in self._own)


def _random_states() -> list[Tensor]:
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *on_gpus]


def _can_resume(network: fx.GraphModule) -> bool:
    """Return whether running the nodes one by one equals calling the network, also after a break."""
    names = {node.target for node in network.graph.nodes if node.op == "placeholder"}
    known = names <= inspect.signature(network.forward).parameters.keys()
    changes_context = any(node.target in _CONTEXT_CALLS for node in network.graph.nodes)
    return known and not changes_context and not network._forward_pre_hooks
