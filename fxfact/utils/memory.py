"""The memory of a device."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fxfact.errors import ArgumentError


def check_memory(what: str, elements: int, like: Tensor) -> None:
    """Raise ArgumentError if tensors of this size cannot fit into the memory of a device.

    Args:
        what: what the tensors are, for the message.
        elements: the number of their elements.
        like: a tensor of the same device and dtype. The meta device holds any size.
    """
    needed, memory = elements * like.element_size(), _device_memory(like.device)
    if memory is not None and needed > memory:
        raise ArgumentError(
            f"{what} would take {needed / 2**30:,.1f} GiB, and the device {like.device} has {memory / 2**30:,.1f} GiB. "
            "Pass a smaller kernel, order or rank, or device='meta' to see the sizes only."
        )


def _device_memory(device: torch.device) -> int | None:
    """Return the memory of a device in bytes, or None if it is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
