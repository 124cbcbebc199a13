"""Finds the names of tensors by the memory that they use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor


class StorageIndex:
    """Maps memory to names. It finds the name of a tensor for an alias, a detached tensor or a view of it.

    Several tensors may be parts of one storage, as all parameters are after ``torch.nn.utils.vector_to_parameters``.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]] = ()) -> None:
        self._entries: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
        for name, tensor in named:
            self.add(name, tensor)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor under a name."""
        if (storage := storage_of(tensor)) is not None:
            self._entries[storage].append((*_byte_range(tensor), name))

    def name_of(self, tensor: Tensor) -> str | None:
        """Return the name of the first tensor added that shares memory with this one, or None."""
        storage = storage_of(tensor)
        if storage is None or storage not in self._entries:
            return None
        begin, end = _byte_range(tensor)
        return next((name for first, last, name in self._entries[storage] if first < end and begin < last), None)


def storage_of(tensor: Tensor) -> int | None:
    """Return a number that identifies the storage of a tensor, or None if it has no storage of its own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of the storage that a tensor may use, and the byte after the last."""
    begin, size = int(tensor.storage_offset()), tensor.element_size()
    last = sum((int(count) - 1) * int(step) for count, step in zip(tensor.shape, tensor.stride(), strict=True))
    return begin * size, (begin + last + 1 if tensor.numel() else begin) * size
