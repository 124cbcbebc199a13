"""Tensor-train decomposition."""

from __future__ import annotations

import tensorly
from tensorly.decomposition import tensor_train
from torch import Tensor


def tt(tensor: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
    """Cores (r_k, n_k, r_k+1), r at both ends 1, by TT-SVD (Oseledets 2011), which TensorLy does.

    ``ranks`` are the inner ones, one less than the tensor has modes, each within what the unfoldings can have.
    """
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return [core.contiguous() for core in tensor_train(tensor, (1, *ranks, 1)).factors]
