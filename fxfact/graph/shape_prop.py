"""Shapes in the nodes' meta: recorded on fake tensors, counted in MACs, and never stale behind a rewrite."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from fxfact.errors import CaptureError


class MacCounter(FlopCounterMode):
    """Counts the multiply-accumulates of whatever runs inside, in the whole.

    A forward may take gradients of its own (``torch.autograd.grad``). What would tell by which module is therefore left
    out: it hooks every gradient, under which that fails. And the gradients of convolutions are not counted: chains save
    on them as they do on the convolutions.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _Whole()  # type: ignore[assignment]
        self.flop_registry.pop(torch.ops.aten.convolution_backward, None)

    def __enter__(self) -> MacCounter:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @property
    def macs(self) -> int:
        """So far."""
        return int(self.get_total_flops()) // 2


class _Whole(contextlib.nullcontext[None]):
    parents = ("Global",)  # FlopCounterMode's name for the whole


def record_shapes(graph_module: fx.GraphModule, values: Sequence[Any], *, fake: bool = True) -> int:
    """Record ``tensor_meta`` for these placeholder values in every node; returns the multiply-accumulates.

    With ``fake`` nothing is computed: the values and the network become fake tensors; a network that decides by values
    needs real ones. Raises CaptureError where the network cannot run on them.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    own = [value.detach().clone() if isinstance(value, Tensor) and not fake else value for value in values]
    try:
        with _quiet(), _kept(graph_module), torch.no_grad():
            propagation = ShapeProp(graph_module, mode)
            propagation.propagate(*own)
            with mode or contextlib.nullcontext(), MacCounter() as counter:
                runnable = propagation.fake_module if mode else graph_module
                fx.Interpreter(runnable).run(*(_fake(value, mode) for value in own))
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise CaptureError(
            f"the network cannot run on example_inputs: {reason}. Pass inputs that it accepts."
        ) from error
    return counter.macs


def record_macs(graph_module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The multiply-accumulates on these arguments, counted on fake tensors: nothing is computed."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = tree_map(lambda value: _fake(value, mode), (args, kwargs))
    with torch.no_grad(), _kept(graph_module), mode, MacCounter() as counter:
        graph_module(*fakes[0], **fakes[1])
    return counter.macs


def macs_by_node(graph_module: fx.GraphModule) -> dict[fx.Node, int]:
    """The multiply-accumulates of every node, on the shapes that the placeholders record; none where these are not
    enough to run on.
    """
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    counting = _Counting(graph_module)
    fakes = [node.meta.get("val") for node in placeholders]
    mode = next((value.fake_mode for value in fakes if isinstance(value, FakeTensor)), FakeTensorMode())
    mode.allow_non_fake_inputs = True
    if any(value is None for value in fakes):
        fakes = _as_recorded(graph_module, placeholders, mode)
    with torch.no_grad(), _kept(graph_module), mode:
        try:
            counting.run(*fakes, enable_io_processing=False)
        except Exception:  # a graph may do anything on values that are none
            return {}
    return counting.macs


class _Counting(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.macs: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with MacCounter() as counter:
            result = super().run_node(n)
        self.macs[n] = counter.macs
        return result


def refresh_shapes(graph_module: fx.GraphModule) -> None:
    """Record anew what the placeholders have: ``tensor_meta``, ``val``, or both. A rewrite leaves its nodes without."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    if placeholders and all("tensor_meta" in node.meta for node in placeholders):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = _as_recorded(graph_module, placeholders, mode)
        with (
            _quiet(),
            _kept(graph_module),
            contextlib.suppress(RuntimeError),
        ):  # one that decides by values keeps the shapes it has
            ShapeProp(graph_module, mode).propagate(*fakes)
    values = [node.meta.get("val") for node in placeholders]
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    if modes and all(value is not None for value in values):
        modes[0].allow_non_fake_inputs = True
        with _kept(graph_module):
            FakeTensorProp(graph_module, modes[0]).propagate_dont_convert_inputs(*values)


def _fake(value: Any, mode: FakeTensorMode | None) -> Any:
    return mode.from_tensor(value) if mode and isinstance(value, Tensor) else value


def _as_recorded(graph_module: fx.GraphModule, placeholders: Sequence[fx.Node], mode: FakeTensorMode) -> list[Any]:
    """Fake values as the placeholders' ``tensor_meta`` describes them, where there is one."""
    device = next((parameter.device for parameter in graph_module.parameters()), torch.device("cpu"))
    with mode:
        return [_empty(node.meta.get("tensor_meta"), device) for node in placeholders]


def _empty(recorded: Any, device: torch.device) -> Any:
    """Tensors as recorded, within the containers that they were recorded in."""
    if isinstance(recorded, TensorMetadata):
        return torch.empty_strided(recorded.shape, recorded.stride, dtype=recorded.dtype, device=device)
    if isinstance(recorded, Mapping):
        return {key: _empty(value, device) for key, value in recorded.items()}
    if isinstance(recorded, list | tuple):
        return type(recorded)(_empty(value, device) for value in recorded)
    return recorded


@contextlib.contextmanager
def _kept(graph_module: fx.GraphModule) -> Iterator[None]:
    """In evaluation mode inside, for in training mode norms may refuse a single sample; and buffers as they were: in
    place operators write to real ones, even where everything else is fake, though not to those that are expanded.
    """
    modes = {module: module.training for module in graph_module.modules()}
    values = {buffer: buffer.clone() for buffer in graph_module.buffers() if not _is_expanded(buffer)}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, value in values.items():
                buffer.copy_(value)


def _is_expanded(tensor: Tensor) -> bool:
    steps = tensor.stride() if tensor.layout == torch.strided else ()
    return any(size > 1 and step == 0 for size, step in zip(tensor.shape, steps, strict=False))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ShapeProp prints the traceback of every error that it raises."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
