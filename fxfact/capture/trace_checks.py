"""Finds what a traced graph would lose: attributes, hooks, in-place writes, and the settings of PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.autograd import Function
from torch.utils._pytree import tree_leaves

from fxfact.conv import has_hooks, is_conv
from fxfact.errors import CaptureError

_IN_PLACE = {"setitem", *(f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow"))}
_DEVICES = ("cpu", "cuda")
_APPLY = Function.apply.__func__.__code__  # type: ignore[attr-defined]
_READ_NAMES = ["is_grad_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled", "_is_any_autocast_enabled"]
_READ_FUNCTIONS = frozenset(getattr(torch._C, name) for name in _READ_NAMES)

TorchContext = tuple[bool | torch.dtype, ...]


class ContextReads:
    """Notices whether the code inside asks PyTorch if gradients or autocast are on.

    The functions that tell, such as ``torch.is_grad_enabled``, are written in C, and no mode of PyTorch sees them.
    Python's profiling hook sees every call of theirs in this thread, also of functions that were imported by name.
    If another profiler that is written in C has the hook, then ``found`` is always True.

    Attributes:
        found: whether such a call was seen.
    """

    def __init__(self) -> None:
        self.found = False
        self._previous: Any = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the calls of this thread."""
        self._previous = sys.getprofile()
        if not isinstance(self._previous, FunctionType | MethodType | None):
            self.found = True
            yield
            return
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(self._previous)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch inside, which saves time and leaves out what torch.fx and fxfact read themselves."""
        watching = sys.getprofile() == self._profile  # not in another thread
        if watching:
            sys.setprofile(self._previous)
        try:
            yield
        finally:
            if watching:
                sys.setprofile(self._profile)

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and argument in _READ_FUNCTIONS:
            self.found = True
        if self._previous is not None:
            self._previous(frame, event, argument)


def current_context() -> TorchContext:
    """Return whether gradients are on, and for each device whether autocast is on and its dtype."""
    gradients = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES]
    return (gradients, *(value for pair in autocast for value in pair))


def context_change(before: TorchContext) -> str:
    """Say how forward has changed the context, or "" if it has not."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _APPLY:
            return "calls an autograd.Function"
        frame = frame.f_back  # type: ignore[assignment]
    now = current_context()
    if now[0] != before[0]:
        return f"turns gradients {'on' if now[0] else 'off'}"
    return "" if now == before else "turns autocast on or off"


@contextmanager
def autocast_everywhere() -> Iterator[None]:
    """Turn autocast on for every device, present or not, so that a forward that turns it off is noticed."""
    before = {device: torch.is_autocast_enabled(device) for device in _DEVICES}
    try:
        for device in before:
            torch.set_autocast_enabled(device, True)
        yield
    finally:
        for device, enabled in before.items():
            torch.set_autocast_enabled(device, enabled)


def check_methods(model: nn.Module) -> None:
    """Raise CaptureError for a module whose forward or ``__call__`` was replaced, which torch.fx may not notice."""
    for name, module in model.named_modules():
        is_leaf = bool(name) and type(module).__module__.startswith("torch.nn")  # torch.fx never calls its forward
        if is_leaf or isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
            continue
        if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
            place = name or type(model).__name__
            raise CaptureError(f"{place} has a forward or __call__ of its own, which a traced graph would not follow")


def conv_attributes(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Return the settings of every convolution, to compare them after the trace."""
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return {p: tuple(getattr(m, name) for name in names) for p, m in model.named_modules() if is_conv(m)}


def buffer_versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the identity and the version of every buffer, which tell if it was replaced or written to."""
    buffers = model.named_buffers()
    return {name: (id(buffer), -1 if buffer.is_inference() else buffer._version) for name, buffer in buffers}


def check_attributes(model: nn.Module, buffers: dict[str, Any], convs: dict[str, Any]) -> None:
    """Raise CaptureError if forward has changed buffers or attributes of modules.

    Args:
        model: the model after the trace.
        buffers: the result of ``buffer_versions`` before the trace.
        convs: the result of ``conv_attributes`` before the trace.
    """
    for changed, now in buffer_versions(model).items():
        if buffers.get(changed) != now:
            raise CaptureError(f"{changed}: forward changes this buffer, which a traced graph would not do")
    for path, attributes in conv_attributes(model).items():
        if convs.get(path) != attributes:
            raise CaptureError(
                f"{path}: forward changes the attributes of this convolution, which tracing would freeze"
            )
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves(value)):
                place = path or "the model"
                raise CaptureError(f"{place}: forward sets the attribute {name!r}, which a traced graph would not do")


def check_hooks(tracer: fx.Tracer, model: nn.Module) -> None:
    """Raise CaptureError for hooks on a module that was traced into. The graph would not run them."""
    leaves = {name for name, module in model.named_modules() if name and tracer.is_leaf_module(module, name)}
    for name, module in model.named_modules():
        inside_a_leaf = any(name == leaf or name.startswith(f"{leaf}.") for leaf in leaves)
        if not inside_a_leaf and has_hooks(module):
            raise CaptureError(f"{name or type(model).__name__} has hooks, which a traced graph would not run")


def check_in_place(graph: fx.Graph, overwritten: Mapping[fx.Node, fx.Node]) -> None:
    """Raise CaptureError for in-place writes that a graph would do in another way than forward.

    Args:
        graph: the traced graph.
        overwritten: for each node that ``+=`` or another augmented assignment wrote to, the node of the result. The
            graph has ``+`` there.
    """
    for old, new in overwritten.items():
        if any(user > new for user in old.users):
            raise CaptureError(
                "forward changes a tensor in place and then uses it under another name. A traced graph would use the "
                "tensor before the change"
            )
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        name = getattr(node.target, "__name__", str(node.target))
        writes = name.strip("_") in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if writes and isinstance(first, fx.Node) and is_constant(first):
            raise CaptureError("forward writes to a tensor that it creates. Tracing would freeze that tensor")


def is_constant(node: fx.Node) -> bool:
    """Return whether a node reads a tensor that forward created during the trace."""
    return node.op == "get_attr" and "_tensor_constant" in str(node.target)
