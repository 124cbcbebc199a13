"""Single precision as it is written, while kernels are decomposed and networks compared: nothing rounds inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch


class _Settings:
    """Those of all backends; whoever comes first changes them, and whoever leaves last puts them back."""

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._before: list[str] = []

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = [setting.fp32_precision for setting in self._all()]
                self._set(["ieee"] * len(self._before))
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
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
    """Products and convolutions of single precision in single precision, not in TF32 or bfloat16 as settings of PyTorch
    may have it, which are those of all threads: they come back when the last one leaves.
    """
    _SETTINGS.enter()
    try:
        yield
    finally:
        _SETTINGS.leave()


@contextmanager
def no_reduced_precision(device: torch.device) -> Iterator[None]:
    """``full_precision``, and no autocast."""
    with torch.autocast(device.type, enabled=False), full_precision():
        yield
