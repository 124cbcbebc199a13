"""Truncated SVD of a matrix through its small Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fxfact.tensor.base import leading_basis, tiny


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``left`` (rows, rank) and ``right`` (rank, columns) whose product is the best approximation of that rank.

    The singular values are shared evenly between the two, so that neither is badly scaled (Eckart and Young 1936).
    ``rank`` is within 1 .. min(rows, columns).
    """
    rows, columns = matrix.shape
    if rows > columns:
        right, left = truncated_svd(matrix.T, rank)
        return left.T, right.T
    basis = leading_basis(matrix, rank).columns
    projected = basis.T @ matrix
    scale = projected.norm(dim=1).sqrt()
    return basis * scale, projected / scale.clamp_min(tiny(matrix) ** 0.5)[:, None]


def singular_squares(matrices: Tensor) -> Tensor:
    """The squares of the singular values (…, min(m, n)) of matrices (…, m, n), descending, by the Gram matrix."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    values: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)
    return values.clamp_min(0).flip(-1)
