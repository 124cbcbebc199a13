"""What Python around an operator decides, and a graph does not record: gradients, autocast, autograd functions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import Function

_DEVICES = ("cpu", "cuda")
_APPLY = Function.apply.__func__.__code__  # type: ignore[attr-defined]
TorchContext = tuple[bool | torch.dtype, ...]


def current_context() -> TorchContext:
    """Whether gradients are on, then whether autocast is, and to what, by device."""
    gradients = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES]
    return (gradients, *(value for pair in autocast for value in pair))


@contextmanager
def autocast_everywhere() -> Iterator[None]:
    """On every device, whether it is there or not: where forward turns it off, that shows."""
    before = {device: torch.is_autocast_enabled(device) for device in _DEVICES}
    try:
        for device in before:
            torch.set_autocast_enabled(device, True)
        yield
    finally:
        for device, enabled in before.items():
            torch.set_autocast_enabled(device, enabled)


def context_change(before: TorchContext) -> str:
    """What forward did to them; empty where nothing."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _APPLY:
            return "calls an autograd.Function"
        frame = frame.f_back  # type: ignore[assignment]
    now = current_context()
    if now[0] != before[0]:
        return f"turns gradients {'on' if now[0] else 'off'}"
    return "" if now == before else "turns autocast on or off"
