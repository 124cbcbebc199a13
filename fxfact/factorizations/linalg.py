"""Singular values and vectors, computed from Gram matrices where their precision allows it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

STRIP = 128  # rows or columns that are processed at a time, so that temporaries stay small


class Basis(NamedTuple):
    """The leading left singular vectors of a matrix.

    Attributes:
        columns: the vectors, orthonormal (rows, rank).
        held: the squared Frobenius norm of the matrix's projection on them.
    """

    columns: Tensor
    held: float


def leading_basis(matrix: Tensor, rank: int) -> Basis:
    """Return the ``rank`` leading left singular vectors of a matrix (rows, columns).

    They are the eigenvectors of its Gram matrix (rows, rows). Rounding moves the eigenvalues by about eps · √rows times
    the largest. That does no harm if the projection misses at least a thousand times as much, or if it can miss nothing
    because ``rank == rows``. Otherwise the Gram matrix is computed in double precision. If that is still coarser than
    the precision of ``matrix``, a full SVD is computed instead.
    """
    rows, own_eps = len(matrix), torch.finfo(matrix.dtype).eps
    for dtype in dict.fromkeys((matrix.dtype, torch.float64)):
        wide = matrix.to(dtype)
        eigenvalues, vectors = torch.linalg.eigh(_lower_gram(wide), UPLO="L")
        total, held = float(eigenvalues.sum()), float(eigenvalues[rows - rank :].sum())
        eps = torch.finfo(dtype).eps
        clear = total - held >= 1e3 * eps * math.sqrt(rows) * float(eigenvalues[-1])
        if clear or rank == rows or own_eps > math.sqrt(eps):
            return Basis(vectors[:, rows - rank :].flip(1).to(matrix.dtype), held)
    left, singular, _ = torch.linalg.svd(matrix, full_matrices=rank > matrix.shape[1])
    return Basis(left[:, :rank].contiguous(), float(singular[:rank].square().sum()))


def _lower_gram(matrix: Tensor) -> Tensor:
    """Return matrix · matrixᵀ, computed in strips of rows. Only the lower triangle is valid."""
    rows = len(matrix)
    gram = matrix.new_zeros(rows, rows)
    for start in range(0, rows, STRIP):
        stop = start + STRIP
        gram[start:stop, :stop] = matrix[start:stop] @ matrix[:stop].T
    return gram


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best low-rank approximation of a matrix as two factors (Eckart and Young 1936).

    The factors share the singular values evenly, so that neither is badly scaled.

    Args:
        matrix: the matrix (rows, columns).
        rank: the rank, from 1 to min(rows, columns).

    Returns:
        ``left`` (rows, rank) and ``right`` (rank, columns), whose product is the approximation.
    """
    rows, columns = matrix.shape
    if rows > columns:
        right, left = truncated_svd(matrix.T, rank)
        return left.T, right.T
    basis = leading_basis(matrix, rank).columns
    projected = basis.T @ matrix
    scale = projected.norm(dim=1).sqrt()
    return basis * scale, projected / scale.clamp_min(torch.finfo(matrix.dtype).tiny ** 0.5)[:, None]


def squared_singular_values(matrices: Tensor) -> Tensor:
    """Return the squared singular values (…, min(m, n)) of matrices (…, m, n), descending, by their Gram matrices."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    values: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)
    return values.clamp_min(0).flip(-1)


def weight_scale(weight: Tensor) -> float:
    """Return a divisor with which the squares of a weight's values stay within single precision.

    Args:
        weight: the weight of a convolution.

    Returns:
        The largest absolute value if it is below 1e-10 or above 1e10, else 1.
    """
    largest = float(weight.detach().abs().max())
    return largest if largest and not 1e-10 < largest < 1e10 else 1.0
