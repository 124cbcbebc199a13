"""What PyTorch keeps around calls and does not write into a graph: gradients, autocast, hooks, modes and settings."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch.autograd import Function

_DEVICES = ("cpu", "cuda")
_APPLY = Function.apply.__func__.__code__  # type: ignore[attr-defined]
_READ_NAMES = ["is_grad_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled", "_is_any_autocast_enabled"]
_READ_FUNCTIONS = frozenset(getattr(torch._C, name) for name in _READ_NAMES)
# Functions that change a setting of the process or the device. TorchContext has the settings of the thread.
_SETTER = re.compile("_?set_|.*(set|exchange)(Device|DeviceIndex|Stream|CurrentStream)$", re.IGNORECASE)
_NO_SETTER = re.compile(
    "grad_enabled|autocast|torch_function|dispatch|tracing|value_trace|conj|neg$|metadata|thread_name"
)
_SETTERS = frozenset(
    getattr(torch._C, name) for name in dir(torch._C) if _SETTER.match(name) and not _NO_SETTER.search(name)
)
_PUSH_MODE = (torch._C._push_on_torch_function_stack, torch._C._push_on_torch_dispatch_stack)


class TorchContext(NamedTuple):
    """What PyTorch keeps for the thread and does not write into a graph.

    Attributes:
        gradients: whether gradients are on.
        autocast: for each device, whether autocast is on and its dtype.
        saved_tensor_hooks: the hooks for tensors that the backward pass needs, or the reason why there may be none.
        modes: how many modes are active for functions and for operators.
        dispatch_keys: the dispatch keys that are included and excluded.
    """

    gradients: bool
    autocast: tuple[tuple[bool, torch.dtype], ...]
    saved_tensor_hooks: tuple[Any, ...]
    modes: tuple[int, int]
    dispatch_keys: tuple[int, int]


class ContextCalls:
    """Notices whether the code inside asks PyTorch if gradients or autocast are on, or changes a setting of PyTorch.

    These functions, such as ``torch.is_grad_enabled``, are written in C, and no mode of PyTorch sees them. Python's
    profiling hook sees every call of theirs in this thread, also of functions that were imported by name. Settings are
    not compared, because other threads change them too. If another profiler that is written in C has the hook, then
    ``reads`` is always True, and changes of settings are not seen.

    Attributes:
        reads: whether a call was seen that asks if gradients or autocast are on.
        changes: the names of the functions that were called to change a setting, as the keys of a dict.
    """

    def __init__(self) -> None:
        self.reads = False
        self.changes: dict[str, None] = {}
        self._previous: Any = None
        self._modes = (0, 0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the calls of this thread."""
        self._previous, self._modes = sys.getprofile(), _count_modes()
        if not isinstance(self._previous, FunctionType | MethodType | None):
            self.reads = True
            yield
            return
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(self._previous)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch inside, which saves time and leaves out what torch.fx and fxfact do themselves."""
        watching = sys.getprofile() == self._profile  # not in another thread
        if watching:
            sys.setprofile(self._previous)
        try:
            yield
        finally:
            if watching:
                sys.setprofile(self._profile)

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            if argument in _READ_FUNCTIONS:
                self.reads = True
            elif argument in _SETTERS:
                self.changes[argument.__name__] = None
            elif argument in _PUSH_MODE and _count_modes() >= self._modes:  # fewer: a mode of the caller comes back
                self.changes["a mode for functions or operators"] = None
        elif event == "call" and frame.f_code.co_name.lstrip("_").startswith("set_") and _is_backend(frame):
            self.changes[frame.f_code.co_name] = None
        if self._previous is not None:
            self._previous(frame, event, argument)


def current_context() -> TorchContext:
    """Return the present context of this thread."""
    return TorchContext(
        gradients=torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
        autocast=tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES),
        saved_tensor_hooks=(
            torch._C._autograd._top_saved_tensors_default_hooks(False),
            torch._C._autograd._saved_tensors_hooks_get_disabled_error_message(),
        ),
        modes=_count_modes(),
        dispatch_keys=(
            torch._C._dispatch_tls_local_include_set().raw_repr(),
            torch._C._dispatch_tls_local_exclude_set().raw_repr(),
        ),
    )


def _is_backend(frame: FrameType) -> bool:
    """Return whether a function is one of torch.backends, some of which keep their settings in Python."""
    return str(frame.f_globals.get("__name__")).startswith("torch.backends")


def _count_modes() -> tuple[int, int]:
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()


def context_change(before: TorchContext) -> str:
    """Say how forward has changed the context, or "" if it has not."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _APPLY:
            return "calls an autograd.Function"
        frame = frame.f_back  # type: ignore[assignment]
    now = current_context()
    in_mode_of_caller = any(one < other for one, other in zip(now.modes, before.modes, strict=True))
    changes = {
        f"turns gradients {'on' if now.gradients else 'off'}": now.gradients != before.gradients,
        "turns autocast on or off": now.autocast != before.autocast,
        "sets hooks for saved tensors, as torch.utils.checkpoint and save_on_cpu do": (
            now.saved_tensor_hooks != before.saved_tensor_hooks
        ),
        "pushes a mode for functions or operators": now.modes != before.modes and not in_mode_of_caller,
        "changes the dispatch keys": now.dispatch_keys != before.dispatch_keys and not in_mode_of_caller,
    }
    return next((change for change, is_found in changes.items() if is_found), "")


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
