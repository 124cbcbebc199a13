"""Finds the plain tensors in a tensor subclass, and the names of tensors by the memory that they use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard, cast

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_wrapper(tensor: object) -> TypeGuard[Tensor]:
    """Whether this is a tensor of a wrapper subclass, which keeps its values in other tensors.

    Quantized weights of torchao, DTensors and nested tensors of jagged layout are.
    """
    return is_traceable_wrapper_subclass(tensor)


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor belongs to several processes."""
    return any(kind.__name__ in ("DTensor", "ShardedTensor") for kind in type(tensor).__mro__)


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that hold the values of a tensor: those in a wrapper subclass, or else the tensor itself."""
    if is_wrapper(tensor):
        names, _ = cast(Any, tensor).__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
    elif tensor.is_nested:
        parts = list(tensor.unbind())
    else:
        return [tensor]
    return [plain for part in parts if isinstance(part, Tensor) for plain in plain_tensors(part)]


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
        for storage, begin, end in _memory_of(tensor):
            self._entries[storage].append((begin, end, name))

    def name_of(self, tensor: Tensor) -> str | None:
        """Return the name of the first tensor added that shares memory with this one, or None."""
        for storage, begin, end in _memory_of(tensor):
            for first, last, name in self._entries.get(storage, ()):
                if first < end and begin < last:
                    return name
        return None


def storages_of(tensor: Tensor) -> tuple[int, ...]:
    """Return numbers that identify the storages with a tensor's values. Sparse tensors have none of their own."""
    return tuple(id_ for plain in plain_tensors(tensor) if (id_ := _storage_id(plain)) is not None)


def _storage_id(plain: Tensor) -> int | None:
    try:
        return int(plain.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def _memory_of(tensor: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield storage, the first byte that the tensor may use, and the byte after the last."""
    for plain in plain_tensors(tensor):
        if (storage := _storage_id(plain)) is not None:
            begin, size = int(plain.storage_offset()), plain.element_size()
            last = sum((int(count) - 1) * int(step) for count, step in zip(plain.shape, plain.stride(), strict=True))
            yield storage, begin * size, (begin + last + 1 if plain.numel() else begin) * size
