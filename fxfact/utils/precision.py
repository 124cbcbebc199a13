"""Turns off TF32, bfloat16 and autocast while kernels are decomposed and networks are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch


class _Settings:
    """The precision settings of all backends, which all threads share.

    The first thread that enters changes them. The last thread that leaves restores them.
    """

    def __init__(self) -> None:
        self._lock, self._users = Lock(), 0
        self._before: list[str] = []

    def enter(self) -> None:
        with self._lock:
            if not self._users:
                self._before = [setting.fp32_precision for setting in self._all()]
                self._set(["ieee"] * len(self._before))
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._set(self._before)

    def _set(self, precisions: list[str]) -> None:
        for setting, precision in zip(self._all(), precisions, strict=True):
            setting.fp32_precision = precision

    @staticmethod
    def _all() -> list[Any]:
        backends: Any = torch.backends
        return [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]


_SETTINGS = _Settings()


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 matrix products and convolutions in float32, even if PyTorch is set to use TF32 or bfloat16.

    The settings apply to all threads. They are restored when the last thread leaves the block.
    """
    _SETTINGS.enter()
    try:
        yield
    finally:
        _SETTINGS.leave()


@contextmanager
def no_reduced_precision(device: torch.device) -> Iterator[None]:
    """Enter ``full_precision``, and disable autocast for the device."""
    with torch.autocast(device.type, enabled=False), full_precision():
        yield
