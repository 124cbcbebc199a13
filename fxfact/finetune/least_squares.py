"""Solves for the last stage of a chain by damped least squares, from sums over the data alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import inf

import torch
from torch import Tensor

_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, inf)  # relative to the diagonal; infinite damping keeps the matrix


@dataclass(frozen=True, eq=False)
class LeastSquaresStats:
    """Sums over rows of a stage's inputs x and of the targets y for its output, in double precision.

    Attributes:
        count: The number of rows.
        inputs: Σ x, of shape (groups, in).
        targets: Σ y, of shape (groups, out).
        target_squares: Σ y², of shape (groups, out).
        input_products: Σ x xᵀ, of shape (groups, in, in).
        cross_products: Σ y xᵀ, of shape (groups, out, in).
    """

    count: int
    inputs: Tensor
    targets: Tensor
    target_squares: Tensor
    input_products: Tensor
    cross_products: Tensor

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor) -> LeastSquaresStats:
        """Sum over the rows of ``inputs`` (groups, count, in) and ``targets`` (groups, count, out)."""
        x, y = inputs.double(), targets.double()
        return cls(x.shape[1], x.sum(dim=1), y.sum(dim=1), y.square().sum(dim=1), x.mT @ x, y.mT @ x)

    def __add__(self, other: LeastSquaresStats) -> LeastSquaresStats:
        tensors = ("inputs", "targets", "target_squares", "input_products", "cross_products")
        sums = (getattr(self, name) + getattr(other, name) for name in tensors)
        return LeastSquaresStats(self.count + other.count, *sums)

    def mean_bias(self, matrix: Tensor) -> Tensor:
        """Return the bias (groups, out) that makes the mean output equal the mean target, for a matrix."""
        return (self.targets - (matrix @ self.inputs[..., None])[..., 0]) / self.count

    def relative_residual(self, matrix: Tensor, bias: Tensor) -> float:
        """Return Σ (y − matrix x − bias)² / variance of y, summed over all outputs.

        A hundredth of the mean variance is added to the variances, for outputs that hardly vary.
        """
        mean = matrix @ self.inputs[..., None]
        linear = (matrix @ self.input_products - 2 * self.cross_products).mul(matrix).sum(dim=2) + self.target_squares
        residual = linear + 2 * bias * (mean[..., 0] - self.targets) + self.count * bias.square()
        variance = self.target_squares - self.targets.square() / self.count
        return float((residual / (variance + 0.01 * variance.mean() + 1e-300)).sum())


def solve_last_stage(
    matrix: Tensor, bias: Tensor, halves: Sequence[LeastSquaresStats], *, last_stages: bool, means: bool
) -> tuple[Tensor, Tensor]:
    """Return a matrix and a bias that fit the data, damped by two-fold cross-validation.

    The candidates are the least-squares solutions for several dampings towards the present matrix, with the present
    bias and with the bias that matches the mean. The one is chosen that, solved on either half, fits the other half
    best, and it is solved on both halves. With one half alone, the least damped candidate is chosen.

    Args:
        matrix: The present matrix (groups, out, in).
        bias: The present bias (groups, out).
        halves: The statistics of one or two halves of the data.
        last_stages: Whether the matrix may change.
        means: Whether the bias may change.
    """
    options = list(product(_DAMPINGS if last_stages else [inf], [None, bias] if means else [bias]))
    folds = [(one, other) for one in halves for other in halves if one is not other]

    def validation_error(option: tuple[float, Tensor | None]) -> float:
        return sum(other.relative_residual(*_solve(matrix, one, *option)) for one, other in folds)

    return _solve(matrix, sum(halves[1:], halves[0]), *min(options, key=validation_error))


def _solve(matrix: Tensor, stats: LeastSquaresStats, damping: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the damped least-squares solution for a fixed bias, or with the bias that matches the mean (None)."""
    mean = stats.inputs / stats.count
    center = stats.targets / stats.count if bias is None else bias
    shift = mean if bias is None else torch.zeros_like(mean)
    square = stats.input_products / stats.count - shift[:, :, None] * shift[:, None]
    cross = stats.cross_products / stats.count - center[:, :, None] * mean[:, None]
    if damping < inf:
        scale = square.diagonal(dim1=1, dim2=2)
        ridge = torch.diag_embed(damping * (scale + scale.mean(dim=1, keepdim=True)) + 1e-30)
        step = torch.linalg.solve(square + ridge, cross - matrix @ square, left=False)
        matrix = matrix + step if bool(step.isfinite().all()) else matrix
    return matrix, stats.mean_bias(matrix) if bias is None else bias
