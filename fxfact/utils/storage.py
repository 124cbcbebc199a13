"""Tensors found again by the memory that they are in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor


class StorageIndex:
    """Names of tensors, for whatever shares memory with them: copies of a module's structure, detached ones, views.

    Tensors may be parts of one storage, as all parameters are behind ``torch.nn.utils.vector_to_parameters``.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]] = ()) -> None:
        self._held: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
        for name, tensor in named:
            self.add(name, tensor)

    def add(self, name: str, tensor: Tensor) -> None:
        """Give a tensor a name."""
        if (storage := storage_of(tensor)) is not None:
            self._held[storage].append((*_extent(tensor), name))

    def name_of(self, tensor: Tensor) -> str | None:
        """That first given to what shares memory with this one, None where nothing does."""
        storage = storage_of(tensor)
        if storage is None or storage not in self._held:
            return None
        begin, end = _extent(tensor)
        return next((name for first, last, name in self._held[storage] if first < end and begin < last), None)


def storage_of(tensor: Tensor) -> int | None:
    """What tells whether two tensors have one storage; None for those that have none of their own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of its storage that a tensor may use, and the first behind the last."""
    begin, size = int(tensor.storage_offset()), tensor.element_size()
    reach = sum((int(count) - 1) * int(step) for count, step in zip(tensor.shape, tensor.stride(), strict=True))
    return begin * size, (begin + reach + 1 if tensor.numel() else begin) * size
