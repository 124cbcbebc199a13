"""Singular vectors and values from Gram matrices."""

from __future__ import annotations

import pytest
import torch

from fxfact.factorizations.linalg import squared_singular_values, truncated_svd
from tests.support import apart


def low_rank(rows: int, columns: int, singular: list[float], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(n, len(singular), generator=generator, dtype=torch.float64) for n in (rows, columns)]
    left, right = (torch.linalg.qr(matrix).Q for matrix in draw)
    return (left * torch.tensor(singular, dtype=torch.float64) @ right.T).to(dtype)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9), (1, 5), (5, 1)])
def test_truncated_svd_is_the_best_approximation(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    singular = torch.linalg.svdvals(matrix)
    for rank in range(1, min(shape) + 1):
        left, right = truncated_svd(matrix, rank)
        missed = (matrix - left @ right).norm()
        assert float(missed - singular[rank:].norm()) < 1e-12
        assert torch.allclose(left.norm(dim=0), right.norm(dim=1))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_truncated_svd_at_full_rank_reaches_the_precision_of_the_dtype(dtype: torch.dtype, allowed: float) -> None:
    matrix = low_rank(40, 60, [10.0 ** (-k / 3) for k in range(40)], dtype)
    left, right = truncated_svd(matrix, 40)
    assert apart(matrix, left @ right) < allowed


def test_truncated_svd_finds_directions_that_a_gram_matrix_in_double_precision_loses() -> None:
    matrix = low_rank(30, 50, [1.0, 1e-5, 1e-9, 1e-10], torch.float64)
    left, right = truncated_svd(matrix, 3)
    assert apart(matrix, left @ right) < 2e-10


def test_truncated_svd_of_zeros_is_zero() -> None:
    left, right = truncated_svd(torch.zeros(4, 6), 2)
    assert not (left @ right).any()
    assert left.isfinite().all()
    assert right.isfinite().all()


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (3, 5, 7)])
def test_squared_singular_values_are_descending(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(squared_singular_values(matrices), torch.linalg.svdvals(matrices).square())
