"""What the decompositions share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def leading_basis(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal columns (rows, rank) spanning the leading left singular vectors of ``matrix`` (rows, columns).

    From the eigenvectors of the (rows, rows) Gram matrix, summed in double precision. An eigenvector of singular
    value s is turned by about eps64 · (s_max / s)², which costs eps64 · s_max / s in the projection: below single
    precision always, but in double precision only while s is not small. Where it is, a full SVD decides instead.
    """
    rows = len(matrix)
    double = matrix.double()
    vectors: Tensor
    eigenvalues, vectors = torch.linalg.eigh(double @ double.T)
    coarse = torch.finfo(matrix.dtype).eps > math.sqrt(torch.finfo(torch.float64).eps)
    if rank == rows or coarse or eigenvalues[-rank] > 1e-6 * eigenvalues[-1]:
        return vectors[:, rows - rank :].flip(1).to(matrix.dtype).contiguous()
    complete = rank > matrix.shape[1]
    left: Tensor = torch.linalg.svd(matrix, full_matrices=complete).U
    return left[:, :rank].contiguous()


def tiny(tensor: Tensor) -> float:
    """The smallest normal number of the dtype: a divisor that changes nothing but 0 / 0."""
    return torch.finfo(tensor.dtype).tiny
