"""Runs torch.fx on a private copy of a model, and refuses what a graph would lose."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxfact.capture.attribute_reads import AttributeReads
from fxfact.capture.base import reason_of, rng_states, seeded_rng
from fxfact.capture.guards import ParameterGuard
from fxfact.capture.torch_context import ContextCalls, autocast_everywhere, context_change, current_context
from fxfact.capture.trace_checks import (
    buffer_versions,
    check_attributes,
    check_hooks,
    check_in_place,
    check_methods,
    check_parameters,
    conv_attributes,
)
from fxfact.conv import PLAIN_TYPES
from fxfact.errors import CaptureError

_TRACE_LOCK = RLock()  # torch.fx patches nn.Module while it traces, and cannot do so in two threads at once


class _Value(fx.Proxy):
    tracer: _Tracer

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("tracer", "node") and not name.startswith("_"):
            raise CaptureError(f"forward sets the attribute {name!r} of a tensor, which a traced graph would not do")
        object.__setattr__(self, name, value)


def _augmented_assignment(name: str) -> Callable[[_Value, Any], Any]:
    def method(self: _Value, other: Any) -> Any:
        result = getattr(operator, name)(self, other)
        self.tracer.overwritten[self.node] = result.node
        return result

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift"):
    setattr(_Value, f"__i{_name.rstrip('_')}__", _augmented_assignment(_name))


class _Tracer(fx.Tracer):
    """Traces a model, with convolutions and modules that torch.fx cannot trace into as leaves.

    torch.fx patches nn.Module for all threads while it traces. The tracer ignores calls from other threads.

    Args:
        leaf_modules: globs on the paths of further leaves.
        calls: notices what forward reads.
    """

    record_stack_traces = True

    # All arguments have defaults, because torch.fx creates a tracer without arguments to unpickle a graph.
    def __init__(self, leaf_modules: Sequence[str] = (), calls: ContextCalls | None = None) -> None:
        super().__init__()
        self._leaf_modules, self._thread = leaf_modules, get_ident()
        self._calls = ContextCalls() if calls is None else calls
        self._context = current_context()
        self.overwritten: dict[fx.Node, fx.Node] = {}  # by ``+=`` and the like, which the graph has as ``+``

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        requested = any(fnmatchcase(qualified_name, pattern) for pattern in self._leaf_modules)
        opaque = isinstance(module, torch.jit.ScriptModule) or "parametrizations" in module._modules
        return requested or opaque or type(module) in PLAIN_TYPES or super().is_leaf_module(module, qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return super().call_module(m, forward, args, kwargs) if self._is_my_thread() else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self._is_my_thread() else attr_val

    def create_arg(self, a: Any) -> Any:
        if (
            isinstance(a, dict | list)
            and type(a) not in (dict, list, OrderedDict)
            and "torch.fx" not in type(a).__module__
        ):
            raise CaptureError(f"forward makes a {type(a).__name__}, which tracing would turn into a plain container")
        return super().create_arg(a)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        with self._calls.paused():
            return super().create_proxy(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        self.check_context()
        return _Value(node, self)

    def check_context(self) -> None:
        """Raise CaptureError if forward has changed the context of PyTorch since the trace began."""
        with self._calls.paused():
            change = context_change(self._context)
        if change:
            raise CaptureError(f"forward {change}, which a traced graph would not do")

    def _is_my_thread(self) -> bool:
        return get_ident() == self._thread


class _TraceGuard(ParameterGuard):  # type: ignore[no-untyped-call]
    """Also notices operators on numbers that forward creates: their result may depend on gradients and autocast."""

    def __init__(self, network: nn.Module, calls: ContextCalls) -> None:
        super().__init__(network)
        self._calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.lift_fresh.default:  # which torch.tensor calls
            numbers = (value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
            self._calls.reads |= any(value.is_floating_point() or value.is_complex() for value in numbers)
        return super().__torch_dispatch__(func, types, args, kwargs)


@dataclass(frozen=True, eq=False)
class Observed:
    """What forward was seen to do in all traces of a model.

    Attributes:
        calls: whether it asks for the context of PyTorch, or changes it.
        attributes: the attributes of modules that it reads.
    """

    calls: ContextCalls = field(default_factory=ContextCalls)
    attributes: AttributeReads = field(default_factory=AttributeReads)


@dataclass(frozen=True)
class TraceSettings:
    """Settings for a trace: those that forward may read, and the seed of the random number generators.

    Attributes:
        training: the mode of all modules. None leaves the modes as they are.
        gradients: whether gradients are on.
        autocast: whether autocast is on, for every device.
        seed: the seed.
    """

    training: bool | None = None
    gradients: bool = True
    autocast: bool = False
    seed: int = 1

    def __str__(self) -> str:
        mode = "" if self.training is None else f"training={self.training}, "
        gradients = "with gradients" if self.gradients else "without gradients"
        return f"{mode}{gradients}{' and autocast' if self.autocast else ''}"


@dataclass(frozen=True, eq=False)
class Trace:
    """The graph of a model.

    Attributes:
        root: the copy that was traced. It has the tensors that forward created.
        graph: the graph.
        code: the Python code of the graph.
    """

    root: nn.Module
    graph: fx.Graph
    code: str


def trace(
    own: nn.Module,
    leaf_modules: Sequence[str],
    observed: Observed,
    settings: TraceSettings | None = None,
    given: dict[str, Any] | None = None,
) -> Trace:
    """Trace a model with torch.fx.

    Args:
        own: a private copy of the model. The trace may add tensors to it.
        leaf_modules: globs on the paths of modules that are not traced into.
        observed: records what forward does.
        settings: the settings of a trace that is only compared with another. Its nodes have no stack traces.
        given: values for arguments, by name.

    Raises:
        ParameterChangedError: if forward changes a parameter.
        CaptureError: if torch.fx cannot trace the model, or the graph would lose something that forward does.
    """
    check_methods(own)
    buffers, convs = buffer_versions(own), conv_attributes(own)
    with _training(own, None if settings is None else settings.training):
        tracer, graph = _run_tracer(own, leaf_modules, observed, settings, given)
    check_hooks(tracer, own)
    check_attributes(own, buffers, convs)
    check_in_place(graph, tracer.overwritten)
    check_parameters(graph, own)
    for node in graph.nodes:
        if isinstance(node.type, str):  # a postponed annotation, which torch.fx cannot pickle
            node.type = None
    return Trace(own, graph, graph.python_code("self").src)


def _run_tracer(
    own: nn.Module,
    leaf_modules: Sequence[str],
    observed: Observed,
    settings: TraceSettings | None,
    given: dict[str, Any] | None,
) -> tuple[_Tracer, fx.Graph]:
    how = settings or TraceSettings()
    autocast = autocast_everywhere() if how.autocast else nullcontext()
    calls = observed.calls
    with torch.set_grad_enabled(how.gradients), autocast, _TraceGuard(own, calls) as guard, seeded_rng(how.seed):
        tracer, states = _Tracer(leaf_modules, calls), rng_states()
        tracer.record_stack_traces = settings is None
        try:
            with _TRACE_LOCK, observed.attributes.recording(own), calls.watching():
                graph = tracer.trace(own, concrete_args=given)
            tracer.check_context()
        except CaptureError:
            raise
        except Exception as error:
            guard.check()
            raise CaptureError(f"torch.fx cannot trace forward: {reason_of(error)}") from error
        if rng_states() != states:
            raise CaptureError("forward draws random numbers, which tracing would freeze")
    guard.check()
    if calls.changes:
        raise CaptureError(
            f"forward changes settings of PyTorch ({', '.join(calls.changes)}), which a graph would not do"
        )
    return tracer, graph


@contextmanager
def _training(model: nn.Module, mode: bool | None) -> Iterator[None]:
    """Put all modules in a mode, and restore their modes at exit. With None, do nothing."""
    modes = {module: module.training for module in model.modules()} if mode is not None else {}
    for module in modes:
        module.training = bool(mode)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
