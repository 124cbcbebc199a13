"""Records shapes in the meta of nodes, counts multiply-accumulates (MACs), and refreshes shapes after a rewrite."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from fxfact.conv import Sizes
from fxfact.errors import CaptureError


def _attention_flops(query: Sizes, key: Sizes, value: Sizes, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _recurrent_flops(input: Sizes, from_input: Sizes, from_state: Sizes, *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs of one layer in one direction on an input (steps, batch, in)."""
    return 2 * math.prod(input[:2]) * (math.prod(from_input) + math.prod(from_state))


_MORE_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops,
}


class MacCounter(FlopCounterMode):
    """Counts the multiply-accumulates of everything that runs inside the context.

    Operators that ``FlopCounterMode`` does not know, attention and recurrent layers on CPUs, are counted as well.
    A mode for functions keeps ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` from calling a fused
    operator, of which ``FlopCounterMode`` counts nothing.

    The count of ``FlopCounterMode`` by module is turned off. It registers hooks on gradients, and these fail in a model
    whose forward calls ``torch.autograd.grad``. The gradients of convolutions are not counted, because a factorization
    reduces them like the convolutions themselves.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_MORE_FORMULAS)
        self.mod_tracker = _NoModules()  # type: ignore[assignment]
        self.flop_registry.pop(torch.ops.aten.convolution_backward, None)
        self._no_fast_path = _NoFastPath()

    def __enter__(self) -> MacCounter:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._no_fast_path.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> Any:
        self._no_fast_path.__exit__(*raised)  # type: ignore[no-untyped-call]
        return super().__exit__(*raised)  # type: ignore[no-untyped-call]

    @property
    def macs(self) -> int:
        """The multiply-accumulates so far."""
        return int(self.get_total_flops()) // 2


class _NoFastPath(TorchFunctionMode):
    """Changes nothing. Its presence makes layers of PyTorch call the operators that they consist of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _NoModules(contextlib.nullcontext[None]):
    parents = ("Global",)  # the name that FlopCounterMode gives to the whole model


def record_shapes(graph_module: fx.GraphModule, values: Sequence[Any], *, fake: bool = True) -> int:
    """Record ``tensor_meta`` in every node.

    Args:
        graph_module: the graph module, which is run in evaluation mode. Its modes and buffers are restored.
        values: one value for each placeholder.
        fake: whether to run on fake tensors, which computes nothing. Pass False for a network whose control flow
            depends on values.

    Returns:
        The number of multiply-accumulates.

    Raises:
        CaptureError: if the network does not run on these values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    inputs = [value.detach().clone() if isinstance(value, Tensor) and not fake else value for value in values]
    try:
        with _no_stderr(), preserve_state(graph_module), torch.no_grad():
            propagation = ShapeProp(graph_module, mode)
            propagation.propagate(*inputs)
            with mode or contextlib.nullcontext(), MacCounter() as counter:
                runnable = propagation.fake_module if mode else graph_module
                fx.Interpreter(runnable).run(*(_to_fake(value, mode) for value in inputs))
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise CaptureError(
            f"the network cannot run on example_inputs: {reason}. Pass inputs that it accepts."
        ) from error
    return counter.macs


def record_macs(graph_module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Count the multiply-accumulates on these arguments. The network runs on fake tensors, so nothing is computed."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = tree_map(lambda value: _to_fake(value, mode), (args, kwargs))
    with torch.no_grad(), preserve_state(graph_module), mode, MacCounter() as counter:
        graph_module(*fakes[0], **fakes[1])
    return counter.macs


def macs_by_node(graph_module: fx.GraphModule) -> dict[fx.Node, int]:
    """Count the multiply-accumulates of every node on the shapes that the placeholders record.

    The result is empty if the network does not run on the recorded shapes.
    """
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    interpreter = _MacInterpreter(graph_module)
    fakes = [node.meta.get("val") for node in placeholders]
    mode = next((value.fake_mode for value in fakes if isinstance(value, FakeTensor)), FakeTensorMode())
    mode.allow_non_fake_inputs = True
    if any(value is None for value in fakes):
        fakes = _recorded_values(graph_module, placeholders, mode)
    with torch.no_grad(), preserve_state(graph_module), mode:
        try:
            interpreter.run(*fakes, enable_io_processing=False)
        except Exception:  # a graph may raise anything if it gets None for a value that was not recorded
            return {}
    return interpreter.macs


class _MacInterpreter(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.macs: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with MacCounter() as counter:
            result = super().run_node(n)
        self.macs[n] = counter.macs
        return result


def refresh_shapes(graph_module: fx.GraphModule) -> None:
    """Record shapes in all nodes again, after a rewrite has inserted nodes without shapes.

    The placeholders decide what is recorded: ``tensor_meta``, ``val``, both or nothing.
    """
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    if placeholders and all("tensor_meta" in node.meta for node in placeholders):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = _recorded_values(graph_module, placeholders, mode)
        # A network whose control flow depends on values raises RuntimeError and keeps the shapes it has.
        with _no_stderr(), preserve_state(graph_module), contextlib.suppress(RuntimeError):
            ShapeProp(graph_module, mode).propagate(*fakes)
    values = [node.meta.get("val") for node in placeholders]
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    if modes and all(value is not None for value in values):
        modes[0].allow_non_fake_inputs = True
        with preserve_state(graph_module):
            FakeTensorProp(graph_module, modes[0]).propagate_dont_convert_inputs(*values)


def _to_fake(value: Any, mode: FakeTensorMode | None) -> Any:
    return mode.from_tensor(value) if mode and isinstance(value, Tensor) else value


def _recorded_values(graph_module: fx.GraphModule, placeholders: Sequence[fx.Node], mode: FakeTensorMode) -> list[Any]:
    """Return fake values with the shapes that the placeholders' ``tensor_meta`` describes."""
    device = next((parameter.device for parameter in graph_module.parameters()), torch.device("cpu"))
    with mode:
        return [_empty_like(node.meta.get("tensor_meta"), device) for node in placeholders]


def _empty_like(recorded: Any, device: torch.device) -> Any:
    """Return empty tensors as described, in the containers that hold the descriptions."""
    if isinstance(recorded, TensorMetadata):
        return torch.empty_strided(recorded.shape, recorded.stride, dtype=recorded.dtype, device=device)
    if isinstance(recorded, Mapping):
        return {key: _empty_like(value, device) for key, value in recorded.items()}
    if isinstance(recorded, list | tuple):
        return type(recorded)(_empty_like(value, device) for value in recorded)
    return recorded


@contextlib.contextmanager
def preserve_state(graph_module: fx.GraphModule) -> Iterator[None]:
    """Put a network in evaluation mode, and restore its modes and the values of its buffers at exit.

    In training mode a batch norm may refuse a single sample. Buffers are restored because in-place operators write to
    real buffers even if all other tensors are fake. Expanded buffers cannot be written to and are left out.
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
def _no_stderr() -> Iterator[None]:
    """Silence ShapeProp, which prints the traceback of every error before it raises it."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
