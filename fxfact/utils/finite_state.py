"""Finds the tensors of a network that are NaN or Inf, which make its outputs NaN or Inf on any data."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain

import torch
from torch import Tensor, nn

from fxfact.errors import WeightError

_SHOWN = 3  # tensors that the message names


def check_finite_state(network: nn.Module, role: str) -> None:
    """Check the tensors of a network whose output is NaN or Inf.

    Buffers may be Inf on purpose, as attention masks are. They are only named if they have NaN.

    Args:
        network: the network.
        role: what the caller calls it.

    Raises:
        WeightError: if tensors of the network are the reason. The message has their names and the counts.
    """
    counts: dict[str, tuple[int, int, int]] = {}
    for name, tensor in chain(network.named_parameters(), network.named_buffers()):
        with suppress(Exception):  # not every subclass of Tensor can be asked
            nan, inf = count_nonfinite(tensor)
            if nan or (inf and isinstance(tensor, nn.Parameter)):
                counts[name] = nan, inf, tensor.numel()
    if counts:
        texts = [f"{name} has {_format(nan, inf)} among {total} values" for name, (nan, inf, total) in counts.items()]
        more = f", and {len(texts) - _SHOWN} more tensors are not finite" if len(texts) > _SHOWN else ""
        raise WeightError(
            f"{role} computes NaN or Inf because of its own weights: {'; '.join(texts[:_SHOWN])}{more}. Load a "
            "checkpoint whose weights are finite."
        )


def _format(nan: int, inf: int) -> str:
    return " and ".join(f"{count} {kind}" for count, kind in ((nan, "NaN"), (inf, "Inf")) if count)


def count_nonfinite(tensor: Tensor) -> tuple[int, int]:
    """Return how many values of a tensor are NaN, and how many are Inf. A tensor on the meta device has none."""
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0, 0
    values = tensor.detach()
    return int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
