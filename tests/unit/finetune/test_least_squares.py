"""Last stages solved from sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxfact.finetune.least_squares import LeastSquaresStats, solve_last_stage


def stats_of(x: Tensor, y: Tensor) -> LeastSquaresStats:
    return LeastSquaresStats.of(x[None].double(), y[None].double())


def halves_of(x: Tensor, y: Tensor) -> list[LeastSquaresStats]:
    return [stats_of(*part) for part in zip(x.chunk(2), y.chunk(2), strict=True)]


def test_residual_from_sums_equals_that_of_the_rows() -> None:
    torch.manual_seed(0)
    x, matrix, bias = torch.randn(50, 6).double() + 1, torch.randn(1, 4, 6).double(), torch.randn(1, 4).double()
    y = torch.randn(50, 4).double() * torch.tensor([1.0, 2.0, 3.0, 4.0])
    left = (y - x @ matrix[0].T - bias).square().sum(dim=0)
    variance = (y - y.mean(dim=0)).square().sum(dim=0)
    expected = (left / (variance + 0.01 * variance.mean())).sum()
    one, other = halves_of(x, y)
    assert (one + other).relative_residual(matrix, bias) == pytest.approx(float(expected))


def test_cross_validation_trusts_many_rows_and_not_few() -> None:
    torch.manual_seed(0)
    true, old = torch.randn(4, 20), torch.randn(1, 4, 20).double()
    bias = torch.zeros(1, 4).double()

    def rows(count: int, noise: float) -> list[LeastSquaresStats]:
        x = torch.randn(count, 20)
        return halves_of(x, x @ true.T + 3 + noise * torch.randn(count, 4))

    matrix, offset = solve_last_stage(old, bias, rows(4000, 0.1), last_stages=True, means=True)
    torch.testing.assert_close(matrix[0].float(), true, atol=0.02, rtol=0)
    torch.testing.assert_close(offset[0].float(), torch.full((4,), 3.0), atol=0.02, rtol=0)
    x = torch.randn(24, 20)
    y = x @ old[0].float().T + 5 * torch.randn(24, 4)  # there is nothing to learn
    few, _ = solve_last_stage(old, bias, halves_of(x, y - y.mean(dim=0)), last_stages=True, means=True)
    plain = torch.linalg.lstsq(x, y).solution.T
    assert float((few - old).norm()) < 0.2 * float((plain - old[0]).norm())
    same, _ = solve_last_stage(old, bias, rows(4000, 0.1), last_stages=False, means=True)
    assert torch.equal(same, old)
    _, same = solve_last_stage(old, bias, rows(4000, 0.1), last_stages=True, means=False)
    assert torch.equal(same, bias)


def test_single_half_is_solved_with_the_least_damping() -> None:
    torch.manual_seed(0)
    x, true, old = torch.randn(400, 5), torch.randn(3, 5), torch.zeros(1, 3, 5).double()
    matrix, _ = solve_last_stage(
        old, torch.zeros(1, 3).double(), [stats_of(x, x @ true.T)], last_stages=True, means=True
    )
    torch.testing.assert_close(matrix[0].float(), true, rtol=0.01, atol=0.01)
