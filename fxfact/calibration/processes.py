"""What several processes of ``torch.distributed`` do together: they sum, and they share objects and samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fxfact.capture import ExampleInputs, samples_of


def samples_of_all_processes(batches: Sequence[ExampleInputs], count: int) -> Sequence[ExampleInputs]:
    """Return the first ``count`` samples of all processes as one batch, in the order of ``DistributedSampler``.

    Sample k of rank r of w is sample k · w + r. Every process must call this, and gets the same. With one process, and
    if the samples have different shapes, the batches of this process are returned.
    """
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return batches
    gathered: list[list[Any]] = gather_objects(list(islice(_single_samples(batches), -(-count // world_size))))
    longest = max(map(len, gathered))
    ordered = [samples[k] for k in range(longest) for samples in gathered if k < len(samples)][:count]
    device = next((leaf.device for leaf in tree_leaves(batches) if isinstance(leaf, Tensor)), None)
    try:
        return [tree_map(lambda *parts: torch.cat(parts).to(device) if _has_samples(parts[0]) else parts[0], *ordered)]
    except RuntimeError:  # pictures of different sizes
        return batches


def _single_samples(batches: Sequence[ExampleInputs]) -> Any:
    """Yield every sample as a batch of its own, on the CPU."""
    for batch in batches:
        size = samples_of(batch)
        for k in range(size):
            yield tree_map(partial(_slice, number=k, size=size), batch)


def _slice(value: Any, *, number: int, size: int) -> Any:
    return value[number : number + 1].cpu() if _has_samples(value) and len(value) == size else value


def _has_samples(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; (0, 1) without ``torch.distributed``."""
    initialized = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)


def gather_objects(own: Any) -> list[Any]:
    """Return the objects of all processes by rank, with this one's itself. Every process must call this."""
    rank, world_size = rank_and_world_size()
    gathered = [own] * world_size
    if world_size > 1:
        dist.all_gather_object(gathered, own)
        gathered[rank] = own
    return gathered


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Sum tensors over all processes, in place. Does nothing if ``torch.distributed`` is not initialized."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for tensor in tensors:
        on_device = tensor.cuda() if dist.get_backend() == "nccl" else tensor
        dist.all_reduce(on_device)
        tensor.copy_(on_device)
