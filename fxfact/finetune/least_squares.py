"""A stage solved for: what brings its output near to what is wanted, by means and second moments alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import inf

import torch
from torch import Tensor

_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, inf)  # of the diagonal; with the last the matrix stays


@dataclass(frozen=True, eq=False)
class LeastSquaresStats:
    """Sums over ``count`` rows of what a stage sees (groups, seen), of what is wanted behind it (groups, out) and its
    squares, and of the products of the one with itself and with the other, in double precision.
    """

    count: int
    seen: Tensor
    wanted: Tensor
    squares: Tensor
    square: Tensor
    product: Tensor

    @classmethod
    def of(cls, seen: Tensor, wanted: Tensor) -> LeastSquaresStats:
        """Of rows (groups, count, seen) and (groups, count, out)."""
        x, y = seen.double(), wanted.double()
        return cls(x.shape[1], x.sum(dim=1), y.sum(dim=1), y.square().sum(dim=1), x.mT @ x, y.mT @ x)

    def __add__(self, other: LeastSquaresStats) -> LeastSquaresStats:
        tensors = ("seen", "wanted", "squares", "square", "product")
        sums = (getattr(self, name) + getattr(other, name) for name in tensors)
        return LeastSquaresStats(self.count + other.count, *sums)

    def offset(self, matrix: Tensor) -> Tensor:
        """The bias (groups, out) with which a matrix (groups, out, seen) gives the mean that is wanted."""
        return (self.wanted - (matrix @ self.seen[..., None])[..., 0]) / self.count

    def missed(self, matrix: Tensor, bias: Tensor) -> float:
        """The part of the variance that a matrix and a bias leave over, summed over all outputs; of those that hardly
        vary, of a hundredth of what is usual.
        """
        given = matrix @ self.seen[..., None]
        linear = (matrix @ self.square - 2 * self.product).mul(matrix).sum(dim=2) + self.squares
        rest = linear + 2 * bias * (given[..., 0] - self.wanted) + self.count * bias.square()
        variance = self.squares - self.wanted.square() / self.count
        return float((rest / (variance + 0.01 * variance.mean() + 1e-300)).sum())


def solve_last_stage(
    matrix: Tensor, bias: Tensor, halves: Sequence[LeastSquaresStats], *, last_stages: bool, means: bool
) -> tuple[Tensor, Tensor]:
    """A matrix (groups, out, seen) and a bias (groups, out) near the least squares for all that was seen.

    Where ``last_stages``, the matrix is damped towards the one that is; where ``means``, the bias may meet the mean. Of all
    that, what brings either half nearest to what is wanted there when it is solved for by the other; with one alone,
    which nothing can be held against, the first: the least damped, with the mean met.
    """
    options = list(product(_DAMPINGS if last_stages else [inf], [None, bias] if means else [bias]))
    pairs = [(one, other) for one in halves for other in halves if one is not other]

    def missed(option: tuple[float, Tensor | None]) -> float:
        return sum(other.missed(*_damped(matrix, one, *option)) for one, other in pairs)

    return _damped(matrix, sum(halves[1:], halves[0]), *min(options, key=missed))


def _damped(matrix: Tensor, found: LeastSquaresStats, damping: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The least squares, about a given bias or with the one that meets the mean."""
    seen, about = found.seen / found.count, found.wanted / found.count if bias is None else bias
    own = seen if bias is None else torch.zeros_like(seen)
    square = found.square / found.count - own[:, :, None] * own[:, None]
    moved = found.product / found.count - about[:, :, None] * seen[:, None]
    if damping < inf:
        scale = square.diagonal(dim1=1, dim2=2)
        ridge = torch.diag_embed(damping * (scale + scale.mean(dim=1, keepdim=True)) + 1e-30)
        step = torch.linalg.solve(square + ridge, moved - matrix @ square, left=False)
        matrix = matrix + step if bool(step.isfinite().all()) else matrix
    return matrix, found.offset(matrix) if bias is None else bias
