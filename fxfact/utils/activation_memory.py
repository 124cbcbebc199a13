"""How much memory activations take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_reference: Any = StorageWeakRef  # which has no types


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that what a call makes takes at one time, its result included, without gradients. Scratch memory
    inside of operations is not seen.
    """
    account = _Account()
    with torch.no_grad(), account:
        call()
    return account.peak


class _Account(TorchDispatchMode):
    """Of the storages that operations make, as long as they live."""

    supports_higher_order_operators = True  # which count as one operation

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._live: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self._live = {key: known for key, known in self._live.items() if not known[0].expired()}
        for storage in _storages(result):
            if storage._cdata not in given:
                self._live[storage._cdata] = (_reference(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _storages(values: Any) -> Iterator[Any]:
    for value in tree_iter(values):
        if isinstance(value, Tensor) and value.layout is torch.strided:
            yield value.untyped_storage()
