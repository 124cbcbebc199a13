"""The first frontend: torch.fx traces the whole model into a graph, and what tracing would lose is looked for."""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from itertools import product
from threading import RLock, get_ident
from typing import Any

import torch
from torch import fx, nn

from fxfact.capture.base import Captured, ExampleInputs, check_arguments, reason_of, rng_states, samples_of, seeded_rng
from fxfact.capture.guards import ParameterGuard
from fxfact.capture.torch_context import autocast_everywhere, context_change, current_context
from fxfact.capture.trace_checks import (
    buffers_of,
    check_attributes,
    check_hooks,
    check_methods,
    check_overwritten,
    conv_attributes,
    is_constant,
)
from fxfact.conv import PLAIN_TYPES, Skip, is_conv
from fxfact.errors import CaptureError
from fxfact.graph import check_invariants, fold_computed_weights, get_tensor, match, record_shapes
from fxfact.utils import alias_copy, difference, get_metadata, set_metadata

_ONE_AT_A_TIME = RLock()  # for torch.fx undoes what it replaced as if nobody else had replaced it since


def capture_graph(
    own: nn.Module,
    example_inputs: ExampleInputs | None,
    *,
    fold_weights: bool = False,
    leaf_modules: Sequence[str] = (),
) -> Captured:
    """Capture a private copy of a model as a graph. A GraphModule, whose graph says what it does, is taken as it is.

    ``example_inputs`` give the graph its shapes; nothing is computed on them, unless a leaf decides by values.
    ``leaf_modules`` are globs on the paths of modules that are not looked into. Raises CaptureError where torch.fx cannot
    trace the model, or where its graph would not do what the model does: hooks, what forward changes in modules,
    gradients and autocast that it turns on or off, and what depends on the training mode or on optional arguments would
    be lost.
    """
    name = type(own).__name__
    if isinstance(own, fx.GraphModule):
        traced = own
    else:
        again = alias_copy(own)  # before tracing leaves its constants there
        traced = _traced(own, name, leaf_modules)
        set_metadata(traced, get_metadata(own))
        _check_again(own, traced, again, leaf_modules)
    known = dict(own.named_modules())
    for path, module in traced.named_modules():
        module.training = known[path].training if path in known else own.training
    folded = fold_computed_weights(traced) if fold_weights else ()
    traced.recompile()
    total = None
    if example_inputs is not None:
        total = _record_shapes(traced, _placeholder_values(traced, own, example_inputs))
    check_invariants(traced, f"behind the capture of {name}")
    found = match(traced)
    samples = samples_of(_recorded_inputs(traced) if example_inputs is None else example_inputs, found.sites)
    return Captured(
        frontend="trace",
        model=name,
        network=traced,
        found=(*found.found, *_unreached(own, traced, folded)),
        macs=None if total is None else total // samples,
        samples=samples,
    )


class _Value(fx.Proxy):
    tracer: _Tracer

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("tracer", "node") and not name.startswith("_"):
            raise CaptureError(f"forward sets the attribute {name!r} of a tensor, which a traced graph would not do")
        object.__setattr__(self, name, value)


def _in_place(name: str) -> Callable[[_Value, Any], Any]:
    def method(self: _Value, other: Any) -> Any:
        result = getattr(operator, name)(self, other)
        self.tracer.overwritten[self.node] = result.node
        return result

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift"):
    setattr(_Value, f"__i{_name.rstrip('_')}__", _in_place(_name))


class _Tracer(fx.Tracer):
    """Records stack traces; what torch.fx cannot look into stays whole, and so recognisable.

    While it traces, torch.fx has replaced how modules are called, and their attributes read, for every thread: other
    threads get what they would without.
    """

    record_stack_traces = True

    def __init__(self, leaf_modules: Sequence[str] = ()) -> None:  # torch.fx makes one of its own to unpickle a graph
        super().__init__()
        self._leaves, self._thread = leaf_modules, get_ident()
        self._surroundings = current_context()
        self.overwritten: dict[fx.Node, fx.Node] = {}  # by ``+=`` and its like, which a graph records as ``+``

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        asked = any(fnmatchcase(qualified_name, pattern) for pattern in self._leaves)
        opaque = isinstance(module, torch.jit.ScriptModule) or hasattr(module, "parametrizations")
        return asked or opaque or type(module) in PLAIN_TYPES or super().is_leaf_module(module, qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return super().call_module(m, forward, args, kwargs) if self._is_mine() else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self._is_mine() else attr_val

    def create_arg(self, a: Any) -> Any:
        if (
            isinstance(a, dict | list)
            and type(a) not in (dict, list, OrderedDict)
            and "torch.fx" not in type(a).__module__
        ):
            raise CaptureError(f"forward makes a {type(a).__name__}, which a traced graph would make a plain container")
        return super().create_arg(a)

    def _is_mine(self) -> bool:
        return get_ident() == self._thread

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if now := context_change(self._surroundings):
            raise CaptureError(f"forward {now}, which a traced graph would not do")
        return _Value(node, self)


def _traced(
    own: nn.Module,
    name: str,
    leaf_modules: Sequence[str],
    *,
    seed: int = 1,
    gradients: bool = True,
    autocast: bool = False,
    given: dict[str, Any] | None = None,
) -> fx.GraphModule:
    """``given`` are values that arguments are bound to."""
    check_methods(own)
    buffers, convs = buffers_of(own), conv_attributes(own)
    around = autocast_everywhere() if autocast else nullcontext()
    with torch.set_grad_enabled(gradients), around, ParameterGuard(own) as guard, seeded_rng(seed):
        tracer, undrawn = _Tracer(leaf_modules), rng_states()
        try:
            with _ONE_AT_A_TIME:
                graph = tracer.trace(own, concrete_args=given)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(f"torch.fx cannot trace forward: {reason_of(error)}") from error
        if rng_states() != undrawn:
            raise CaptureError("forward draws random numbers that a traced graph would freeze")
    guard.check()
    check_hooks(tracer, own)
    check_attributes(own, buffers, convs)
    check_overwritten(graph, tracer.overwritten)
    for node in graph.nodes:
        if isinstance(node.type, str):  # a postponed annotation, which torch.fx cannot pickle
            node.type = None
    try:
        return fx.GraphModule(own, graph, name)
    except Exception as error:
        raise CaptureError(f"torch.fx cannot make a module of the graph: {reason_of(error)}") from error


def _check_again(own: nn.Module, traced: fx.GraphModule, again: nn.Module, leaf_modules: Sequence[str]) -> None:
    """Trace copies in both modes, with gradients and without, under autocast, from another seed, and without arguments
    that may be left out; raise CaptureError where that makes a difference.
    """
    for training, gradients in product((True, False), repeat=2):
        if gradients and all(module.training == training for module in own.modules()):
            continue  # which the first was
        other = alias_copy(again)
        for module in other.modules():
            module.training = training
        how = f"training={training}, {'with' if gradients else 'without'} gradients"
        try:
            second = _traced(other, "", leaf_modules, seed=2, gradients=gradients)
        except CaptureError as error:
            raise CaptureError(f"traced with {how}, it fails: {error}") from error
        if second.code != traced.code:
            raise CaptureError("forward depends on self.training or torch.is_grad_enabled(): a graph would freeze them")
        if not _same_constants(traced, second):
            raise CaptureError("forward makes a tensor anew in every call, which a traced graph would freeze")
    if _traced(alias_copy(again), "", leaf_modules, autocast=True).code != traced.code:
        raise CaptureError("forward depends on torch.is_autocast_enabled(): a graph would freeze it")
    signature = inspect.signature(own.forward).parameters.values()
    optional = {p.name: p.default for p in signature if p.default is not inspect.Parameter.empty}
    if optional and _operations(traced) != _operations(_traced(alias_copy(again), "", leaf_modules, given=optional)):
        raise CaptureError(
            f"forward depends on whether {', '.join(optional)} is given, which a traced graph would freeze"
        )


def _same_constants(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    names = [str(node.target) for node in one.graph.nodes if is_constant(node)]
    pairs = [(get_tensor(one, name), get_tensor(other, name)) for name in names]
    return all(a is not None and b is not None and difference(a, b, strictness=0.0) == "" for a, b in pairs)


def _operations(graph_module: fx.GraphModule) -> list[tuple[str, str]]:
    """What the graph does, apart from its arguments and from what torch.fx asserts of those bound to a value."""
    nodes = [node for node in graph_module.graph.nodes if node.op not in ("placeholder", "output")]
    names = [(node.op, getattr(node.target, "__name__", str(node.target))) for node in nodes]
    return [pair for pair in names if pair[1] not in ("_assert_is_none", "_assert", "eq")]


def _placeholder_values(graph_module: fx.GraphModule, model: nn.Module, example_inputs: ExampleInputs) -> list[Any]:
    """The values for the graph's placeholders, in their order. Raises CaptureError where the inputs do not fit."""
    bound = check_arguments(model, example_inputs)
    values: list[Any] = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            name = str(node.target).lstrip("*")
            if name not in bound.arguments:
                raise CaptureError(f"the graph takes its arguments apart, and {name} is none of them")
            value = bound.arguments[name]
            values += value if str(node.target).startswith("*") else [value]
    return values


def _record_shapes(traced: fx.GraphModule, values: list[Any]) -> int:
    """Without computing anything, unless a leaf decides by values."""
    try:
        return record_shapes(traced, values)
    except CaptureError:
        with ParameterGuard(traced), seeded_rng():
            return record_shapes(traced, values, fake=False)


def _recorded_inputs(graph_module: fx.GraphModule) -> list[Any]:
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    return [node.meta.get("val", node.meta.get("tensor_meta")) for node in placeholders]


def _unreached(model: nn.Module, traced: fx.GraphModule, folded: Sequence[str]) -> tuple[Skip, ...]:
    owners = {name.rpartition(".")[0] for name in folded}  # their own weights are gone, what was made of them is not
    reached = set(map(id, traced.modules())) | set(map(id, traced.parameters()))
    return tuple(
        Skip("forward does not call it", name)
        for name, module in model.named_modules()
        if is_conv(module)
        and name not in owners
        and id(module) not in reached
        and not reached & set(map(id, module.parameters()))
    )
