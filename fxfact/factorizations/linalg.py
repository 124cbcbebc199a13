"""What the decompositions share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")
STRIP = 128  # rows or columns at a time, for small temporaries


class Basis(NamedTuple):
    """Orthonormal ``columns`` (rows, rank), and the squared Frobenius norm that projecting on them ``held``."""

    columns: Tensor
    held: float


def leading_basis(matrix: Tensor, rank: int) -> Basis:
    """The leading left singular vectors of a matrix (rows, columns).

    They are the eigenvectors of its (rows, rows) Gram matrix. Rounding moves the eigenvalues by about eps · √rows of
    the largest, which is harmless while what the projection misses is a thousand times as much, or nothing can be
    missed because ``rank == rows``. Else the Gram matrix is summed in double precision, and where even that is coarser
    than the matrix's own precision, a full SVD decides.
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
    """The lower triangle of matrix · matrixᵀ, computed in strips of rows; what stands above it means nothing."""
    rows = len(matrix)
    gram = matrix.new_zeros(rows, rows)
    for start in range(0, rows, STRIP):
        stop = start + STRIP
        gram[start:stop, :stop] = matrix[start:stop] @ matrix[:stop].T
    return gram


def descend(
    sweep: Callable[[State], tuple[State, float]],
    extrapolate: Callable[[State, State, float], State],
    start: State,
    *,
    sweeps: int,
    tolerance: float,
    step: float,
    longest: float,
) -> State:
    """Repeat ``sweep``, which improves a state and gives its error, from states extrapolated beyond the last two.

    The extrapolation goes ``step`` times their distance. A sweep that does not lower the error is undone and the step
    halved; after one that does, it grows by a tenth, up to ``longest`` (after Ang, Cohen, Gillis and Hien 2020). Ends
    when an accepted sweep lowers the error by less than ``tolerance``, or after ``sweeps`` of them.
    """
    best, error = start, math.inf
    for _ in range(sweeps):
        found, found_error = sweep(start)
        if not found_error < error:  # also where extrapolation led to NaN
            if start is best:
                break
            start, step = best, step / 2
            continue
        gain, previous = error - found_error, best
        best, error = found, found_error
        if gain < tolerance:
            break
        start = extrapolate(best, previous, step)
        step = min(step * 1.1, longest)
    return best


def tiny(tensor: Tensor) -> float:
    """The smallest normal number of the dtype: a divisor that changes nothing but 0 / 0."""
    return torch.finfo(tensor.dtype).tiny


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
