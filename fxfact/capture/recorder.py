"""Runs a model and records the calls of its convolutions and other uses of their weights."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxfact.capture.base import ExampleInputs, run_model
from fxfact.capture.guards import ParameterGuard
from fxfact.conv import (
    ConvCall,
    ConvSpec,
    FactorizedModule,
    Sizes,
    Skip,
    insert_base,
    is_conv,
    looks_like_conv,
    matrix_of,
    overrides_conv_forward,
    read_call,
    spec_of,
)
from fxfact.errors import SpecError
from fxfact.graph import MacCounter
from fxfact.utils import StorageIndex


@dataclass
class ConvCalls:
    """The calls of one convolution module.

    Attributes:
        specs: what the calls compute, as the keys of a dict. More than one is an obstacle.
        shapes: the input shape of every call.
        obstacles: reasons why the module cannot be replaced, as the keys of a dict, which keeps their order.
    """

    specs: dict[ConvSpec, None] = field(default_factory=dict)
    shapes: list[Sizes] = field(default_factory=list)
    obstacles: dict[str, None] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ModuleRecord:
    """The record of one run.

    Attributes:
        output: the output of the model.
        macs: the multiply-accumulates of the run.
        calls: for each convolution module that was called or used, by path, its calls. The order is that of the calls.
        by_function: the convolutions that are functional calls and not modules.
    """

    output: Any
    macs: int
    calls: dict[str, ConvCalls]
    by_function: tuple[Skip, ...]


def record_modules(network: nn.Module, example_inputs: ExampleInputs) -> ModuleRecord:
    """Run a private copy of a model in evaluation mode and record its convolutions.

    Args:
        network: the copy. It cannot be used again, because its convolutions change their classes.
        example_inputs: the inputs to run on.

    Raises:
        CaptureError: if forward changes a parameter. Errors of the model are not caught.
    """
    network.eval()
    log = _Recording(network)
    with MacCounter() as counter, _OperatorRecorder(network, log) as guard, _FunctionRecorder(log):
        output = run_model(network, example_inputs)
    guard.check()
    for value in tree_leaves(output):
        if isinstance(value, Tensor) and (path := log.paths.name_of(value)) is not None:
            log.calls[path].obstacles["its weight is also an output of forward"] = None
    return ModuleRecord(output, counter.macs, dict(log.calls), tuple(log.by_function))


class _Recording:
    """What was recorded so far.

    Attributes:
        calls: the calls of each convolution module, by path.
        by_function: the functional convolutions, as the keys of a dict.
        modules: the paths of the modules that are running, outermost first.
        inside: the paths of the convolutions that are being computed. Of several with one weight, the first path.
        convs: the convolution modules, by path.
        paths: finds the path of a convolution by the memory of its weight.
        specs: the specs of the convolutions before the run.
        parameters: finds the name of a parameter by its memory.
    """

    def __init__(self, network: nn.Module) -> None:
        self.calls: dict[str, ConvCalls] = defaultdict(ConvCalls)
        self.by_function: dict[Skip, None] = {}
        self.modules: list[str] = []
        self.inside: list[str | None] = []
        self.convs: dict[str, nn.Module] = {}
        self.paths = StorageIndex()
        self.specs: dict[str, ConvSpec] = {}
        self.parameters = StorageIndex(network.named_parameters())
        for path, module in network.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            module.register_forward_pre_hook(partial(self._enter, path), prepend=True)
            module.register_forward_hook(self._leave, always_call=True)
            if is_conv(module) and not isinstance(module, FactorizedModule):
                self.convs[path] = module
                if (weight := module._parameters.get("weight")) is not None:
                    self.paths.add(path, weight)
                vars(module)["_probe"] = (self, path)
                with contextlib.suppress(SpecError):
                    self.specs[path] = spec_of(module)
                module.__class__ = insert_base(type(module), _Probe, "Watched")

    @contextlib.contextmanager
    def computing(self, path: str, spec: ConvSpec, input: Any) -> Iterator[None]:
        """Record a call of a convolution. The call is inside the context."""
        calls = self.calls[path]
        calls.shapes.append(tuple(input.shape))
        calls.specs[spec] = None
        if len(calls.specs) > 1:
            calls.obstacles["its forward convolves with different settings"] = None
        weight = self.convs[path]._parameters.get("weight")
        self.inside.append(None if weight is None else self.paths.name_of(weight))
        try:
            yield
        finally:
            self.inside.pop()

    def caller_of(self, call: ConvCall) -> str | None:
        """Return the path of the running convolution module that passes its own weight to this call, if one does."""
        running = (path for path in reversed(self.modules) if path in self.convs)
        return next((path for path in running if call.weight is self.convs[path]._parameters.get("weight")), None)

    def note_linear(self, call: ConvCall) -> None:
        """Record a linear layer that is no module. Of products, only those with a parameter are linear layers."""
        weight = matrix_of(call.weight)
        name = None if weight is None else self.parameters.name_of(weight)
        if weight is None or self.paths.name_of(weight) is not None or (call.is_product and name is None):
            return  # the operators that read the weight of a module are recorded with it
        self.note_function(name)

    def note_function(self, name: str | None) -> None:
        """Record a convolution that is no module, and whose weight has this name, or is computed."""
        how = "" if name else ", with a weight that is computed"
        subject = name or f"{self.where}.forward".lstrip(".")
        self.by_function[Skip(f"called as a function{how}, which only a graph can rewrite", subject)] = None

    def _enter(self, path: str, module: nn.Module, args: Any) -> None:
        self.modules.append(path)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.modules.pop()

    @property
    def where(self) -> str:
        """The path of the module that is running."""
        return self.modules[-1] if self.modules else ""


class _Probe(nn.Module):
    """A base class that is inserted between a convolution's class and PyTorch's. Its forward records the call."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        log, path = vars(self)["_probe"]
        spec = spec_of(self)
        if spec != log.specs.get(path):
            log.calls[path].obstacles["its attributes are changed while the model runs"] = None
        by_function = overrides_conv_forward(type(self))  # then _FunctionRecorder records it
        with contextlib.nullcontext() if by_function else log.computing(path, spec, input):
            output: Tensor = super().forward(input, *args, **kwargs)
            return output


class _FunctionRecorder(TorchFunctionMode):
    """Records functional convolutions that a module calls with its own weight, as PyTorch's class does."""

    def __init__(self, log: _Recording) -> None:
        super().__init__()
        self._log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, log = kwargs or {}, self._log
        call = read_call(func, args, kwargs)
        path = None if call is None or log.inside else log.caller_of(call)
        if call is None or path is None:
            if call is not None and call.is_linear and not log.inside:
                log.note_linear(call)
            return func(*args, **kwargs)
        try:
            spec = call.spec_for(call.weight.shape, bias=call.bias is not None)
        except SpecError as error:
            log.calls[path].obstacles[str(error)] = None
            return func(*args, **kwargs)
        if call.bias is not None and call.bias is not log.convs[path]._parameters.get("bias"):
            log.calls[path].obstacles["its forward computes its bias"] = None
        with log.computing(path, spec, call.input):
            return func(*args, **kwargs)


class _OperatorRecorder(ParameterGuard):  # type: ignore[no-untyped-call]
    """Records operators that read the weight of a convolution outside its call, and convolutions without a module."""

    def __init__(self, network: nn.Module, log: _Recording) -> None:
        super().__init__(network)
        self._log = log

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self._log.inside and looks_like_conv(func):
            self._convolved(args)
        elif not _is_view(func) and torch._C._current_graph_task_id() == -1:  # autograd reads what the forward read
            for tensor in tree_leaves((args, kwargs)):
                self._read(tensor, str(func))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _read(self, tensor: Any, reader: str) -> None:
        log = self._log
        path = log.paths.name_of(tensor) if isinstance(tensor, Tensor) else None
        if path is not None and path not in log.inside:
            log.calls[path].obstacles[f"its weight is also read by {reader} in {log.where or 'forward'}"] = None

    def _convolved(self, args: tuple[Any, ...]) -> None:
        log = self._log
        weight = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else None
        if log.where in log.convs:
            log.calls[log.where].obstacles["its forward computes its weight, or more than one convolution"] = None
            return
        name, path = (None if weight is None else known.name_of(weight) for known in (log.parameters, log.paths))
        if path is None:
            log.note_function(name)
        else:
            log.calls[path].obstacles[f"its weight is also used in {log.where or 'forward'}"] = None


def _is_view(func: Any) -> bool:
    if isinstance(func, HigherOrderOperator):
        return False
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
