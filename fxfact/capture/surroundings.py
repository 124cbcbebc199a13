"""What Python around an operator decides, and a graph does not record: gradients, autocast, autograd functions."""

from __future__ import annotations

import sys

import torch
from torch.autograd import Function

_DEVICES = ("cpu", "cuda")
_APPLY = Function.apply.__func__.__code__  # type: ignore[attr-defined]
Surroundings = tuple[tuple[bool, torch.dtype], ...]


def surroundings() -> Surroundings:
    """Whether autocast is on, and to what, by device."""
    return tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES)


def surroundings_changed(before: Surroundings) -> str:
    """What forward did to them, gradients having been on before; empty where nothing."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _APPLY:
            return "calls an autograd.Function"
        frame = frame.f_back  # type: ignore[assignment]
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        return "turns gradients off"
    return "" if surroundings() == before else "turns autocast on or off"
