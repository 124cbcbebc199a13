"""The peak memory of activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_weak_reference: Any = StorageWeakRef  # has no type annotations


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the peak number of bytes of the tensors that ``call`` creates, including its result.

    The call runs without gradients. Temporary memory inside an operator is not counted.
    """
    tracker = _StorageTracker()
    with torch.no_grad(), tracker:
        call()
    return tracker.peak


class _StorageTracker(TorchDispatchMode):
    """Tracks the storages that operators create, as long as they are alive."""

    supports_higher_order_operators = True  # each counts as one operator

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._live: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for storage in _storages(result):
            if storage._cdata not in inputs:
                self._live[storage._cdata] = (_weak_reference(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _storages(values: Any) -> Iterator[Any]:
    for value in tree_iter(values):
        if isinstance(value, Tensor) and value.layout is torch.strided:
            yield value.untyped_storage()
