"""The factors of a CP decomposition in a Fisher metric: L-BFGS in coordinates that follow the curvature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from fxfact.factorizations.fit import LEAST_GAIN, MULTIPLICATIONS, LastStage, minimise
from fxfact.factorizations.weighted_kernel import WeightedKernel

_ROUND = 24  # iterations in the same coordinates
_DAMPING = 1e-2  # of the mean of the diagonal of the curvature


def fit_factors(
    kernel: WeightedKernel,
    factors: Sequence[Tensor],
    inverses: Sequence[Tensor],
    *,
    iterations: int,
    multiplications: float = MULTIPLICATIONS,
) -> list[Tensor]:
    """Minimise the loss increase over the factors of a whitened kernel.

    As in ``fit_chain``, the factor of the outer channels is solved for. The components are far from orthogonal, so
    plain L-BFGS is slow. Every few iterations it starts again in coordinates in which each factor's own block of the
    Gauss-Newton matrix is the identity. For a metric that the whitening makes the identity, that block is the
    elementwise product of the Gram matrices of all other factors.

    Args:
        kernel: the kernel in its metric.
        factors: where to start: (inner, rank), then (positions, rank) for each group of axes.
        inverses: ``Whitened.inverses``, which lead from the factors to the kernel.
        iterations: the largest number of iterations.
        multiplications: of one iteration. If it takes more, there are proportionally fewer iterations.

    Returns:
        The factors, then that of the outer channels (outer, rank). All are whitened.
    """
    last, rank = LastStage(kernel), factors[0].shape[1]
    left = last.affordable(iterations, rank, multiplications)
    rows = [_unit(factor.T) for factor in factors]

    def kernels(parts: Sequence[Tensor]) -> Tensor:
        own = (part @ inverse for part, inverse in zip(parts, inverses, strict=True))
        return reduce(lambda one, other: (one[:, :, None] * other[:, None]).flatten(1), own)

    error, _, outer = last.error(kernels(rows))
    before = float(error)
    while left > 0:
        moved = [_unit(part) for part in _round(last, kernels, rows, outer, min(left, _ROUND))]
        error, _, solved = last.error(kernels(moved))
        now = float(error)
        if not now < before:
            break
        rows, outer = moved, solved
        if before - now < LEAST_GAIN * now:
            break
        left, before = left - _ROUND, now
    return [*(part.T for part in rows), outer]


def _round(
    last: LastStage,
    kernels: Callable[[Sequence[Tensor]], Tensor],
    rows: Sequence[Tensor],
    outer: Tensor,
    iterations: int,
) -> list[Tensor]:
    """Return the rows of the factors after some iterations in coordinates that suit them."""
    scale = float(outer.norm()) + torch.finfo(outer.dtype).tiny
    triangles = [_curvature([outer.T, *rows[:k], *rows[k + 1 :]]) for k in range(len(rows))]
    coordinates = [triangle.T @ part / scale for triangle, part in zip(triangles, rows, strict=True)]

    def parts() -> list[Tensor]:
        pairs = zip(triangles, coordinates, strict=True)
        return [torch.linalg.solve_triangular(triangle.T, part * scale, upper=True) for triangle, part in pairs]

    def error() -> Tensor:
        composed = kernels(parts())
        value, gradient, _ = last.error(composed.detach())
        torch.autograd.backward(composed, gradient)
        return value

    minimise(coordinates, error, iterations)
    with torch.no_grad():
        return [part.detach() for part in parts()]


def _unit(rows: Tensor) -> Tensor:
    """Return the rows with norm 1, or less if their squares are too small for the dtype."""
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny ** 0.5)
    return unit


def _curvature(rows: Sequence[Tensor]) -> Tensor:
    """Return the Cholesky factor of the elementwise product of Gram matrices, damped."""
    product = reduce(torch.mul, ((part @ part.T).double() for part in rows))
    least = float(product.diagonal().mean()) * _DAMPING + torch.finfo(product.dtype).tiny
    product.diagonal().add_(least)
    triangle: Tensor = torch.linalg.cholesky(product).to(rows[0])
    return triangle
