"""A hash of the values of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from fxfact.utils.storage import plain_tensors


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """Return a short hash of data types and values, whatever the device and the strides; '' on the meta device."""
    digest = hashlib.sha256()
    for tensor in (plain for each in tensors for plain in plain_tensors(each.detach())):
        if tensor.is_meta:
            return ""
        digest.update(str(tensor.dtype).encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
