"""One run of the model's own Python: what comes out, and what happens to every convolution on the way."""

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
    differentiates_conv,
    insert_base,
    is_conv,
    looks_like_conv,
    read_call,
    spec_of,
)
from fxfact.errors import SpecError
from fxfact.graph import MacCounter
from fxfact.utils import StorageIndex


@dataclass
class ConvCalls:
    """What happened to one convolution module: the shapes it ran on, and what keeps it from being replaced."""

    shapes: list[Sizes] = field(default_factory=list)
    against: dict[str, None] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ModuleRecord:
    """``calls`` by the path of every convolution module, in the order of the calls, those never called left out.

    ``by_function`` has the convolutions that are no modules. ``macs`` is the whole run's.
    """

    output: Any
    macs: int
    calls: dict[str, ConvCalls]
    by_function: tuple[Skip, ...]


def record_modules(network: nn.Module, example_inputs: ExampleInputs) -> ModuleRecord:
    """Run a private copy, in evaluation mode. Raises CaptureError where forward changes a parameter.

    What the model itself raises comes through. The copy is spent: its convolutions are of watching classes afterwards.
    """
    network.eval()
    log = _Log(network)
    with MacCounter() as counter, _Reads(network, log) as guard, _FunctionCalls(log):
        output = run_model(network, example_inputs)
    guard.check()
    for value in tree_leaves(output):
        if isinstance(value, Tensor) and (path := log.paths.name_of(value)) is not None:
            log.calls[path].against["its weight is also in what forward returns"] = None
    return ModuleRecord(output, counter.macs, dict(log.calls), tuple(log.by_function))


class _Log:
    """Who is running: ``modules`` are the paths of the modules called, ``inside`` those of the convolutions being
    computed, the first of those that share a weight.
    """

    def __init__(self, network: nn.Module) -> None:
        self.calls: dict[str, ConvCalls] = defaultdict(ConvCalls)
        self.by_function: dict[Skip, None] = {}
        self.modules: list[str] = []
        self.inside: list[str | None] = []
        self.convs: dict[str, nn.Module] = {}
        self.paths = StorageIndex()  # of the weights
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
    def computing(self, path: str, input: Any) -> Iterator[None]:
        """While a convolution is computed as PyTorch's own class would compute it."""
        self.calls[path].shapes.append(tuple(input.shape))
        weight = self.convs[path]._parameters.get("weight")
        self.inside.append(None if weight is None else self.paths.name_of(weight))
        try:
            yield
        finally:
            self.inside.pop()

    def _enter(self, path: str, module: nn.Module, args: Any) -> None:
        self.modules.append(path)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.modules.pop()

    @property
    def where(self) -> str:
        """The path of the module that runs."""
        return self.modules[-1] if self.modules else ""


class _Probe(nn.Module):
    """Beneath a convolution's class: its forward is reached where PyTorch's own would be."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        log, path = vars(self)["_probe"]
        if args or any(value is not None for value in kwargs.values()):
            log.calls[path].against["it is called with other arguments than one input"] = None
        if spec_of(self) != log.specs.get(path):
            log.calls[path].against["its attributes are changed while the model runs"] = None
        with log.computing(path, input):
            output: Tensor = super().forward(input, *args, **kwargs)
            return output


class _FunctionCalls(TorchFunctionMode):
    """Sees a subclass of a convolution call the functional one, as PyTorch's own class would, on its own weight."""

    def __init__(self, log: _Log) -> None:
        super().__init__()
        self._log = log

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, log = kwargs or {}, self._log
        call = read_call(func, args, kwargs)
        module = log.convs.get(log.where)
        if call is None or module is None or log.inside or call.weight is not module._parameters.get("weight"):
            return func(*args, **kwargs)
        if not _as_described(module, call):
            log.calls[log.where].against["its forward convolves in another way than its attributes say"] = None
        with log.computing(log.where, call.input):
            return func(*args, **kwargs)


def _as_described(module: nn.Module, call: ConvCall) -> bool:
    """Whether a functional call computes what the attributes of the module describe."""
    try:
        same_bias = call.bias is module._parameters.get("bias")
        return same_bias and spec_of(module) == call.spec_for(call.weight.shape, bias=call.bias is not None)
    except SpecError:
        return False


class _Reads(ParameterGuard):  # type: ignore[no-untyped-call]
    """Sees operators read the weight of a convolution that is not being computed, and convolve without a module."""

    def __init__(self, network: nn.Module, log: _Log) -> None:
        super().__init__(network)
        self._log = log

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self._log.inside and looks_like_conv(func):
            self._convolved(args)
        elif not _is_view(func) and not differentiates_conv(func):
            for tensor in tree_leaves((args, kwargs)):
                self._read(tensor, str(func))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _read(self, tensor: Any, reader: str) -> None:
        log = self._log
        path = log.paths.name_of(tensor) if isinstance(tensor, Tensor) else None
        if path is not None and path not in log.inside:
            log.calls[path].against[f"its weight is also read by {reader} in {log.where or 'forward'}"] = None

    def _convolved(self, args: tuple[Any, ...]) -> None:
        log = self._log
        weight = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else None
        if log.where in log.convs:
            log.calls[log.where].against["its forward computes its weight, or more than one convolution"] = None
            return
        name, path = (None if weight is None else known.name_of(weight) for known in (log.parameters, log.paths))
        subject = name or f"{log.where}.forward".lstrip(".")
        how = "" if name else ", with a weight that is computed"
        if path is None:
            log.by_function[Skip(f"called as a function{how}, which only a graph can rewrite", subject)] = None
        else:
            log.calls[path].against[f"its weight is also used in {log.where or 'forward'}"] = None


def _is_view(func: Any) -> bool:
    if isinstance(func, HigherOrderOperator):
        return False
    return any(value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns)
