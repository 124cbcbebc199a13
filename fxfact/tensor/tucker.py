"""Tucker decomposition over the first two modes, the later ones kept whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxfact.tensor.base import descend, leading_basis


def partial_tucker(
    tensor: Tensor, ranks: tuple[int, int], *, sweeps: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``first`` (n_0, r_0), ``second`` (n_1, r_1), orthonormal, and ``core`` (r_0, r_1, *rest).

    Higher-order orthogonal iteration (De Lathauwer, De Moor and Vandewalle 2000) on Gram matrices, begun at the
    sequentially truncated higher-order SVD. A sweep finds the first basis for the second and the second for the first;
    the second is extrapolated between sweeps, and the end is decided as ``descend`` says. Exact at full ranks.
    """
    rest = tensor[0, 0].numel()
    middle = tensor.flatten(2).transpose(1, 2).contiguous()  # (n_0, rest, n_1), so that no product below copies
    rows, columns = middle.flatten(1), middle.flatten(0, 1)
    total = float(rows.square().sum())

    def with_second(second: Tensor) -> Tensor:
        return (columns @ second).reshape(len(rows), -1)

    def with_first(first: Tensor) -> Tensor:
        return (first.T @ rows).reshape(-1, columns.shape[1]).T

    def sweep(second: Tensor) -> tuple[Tensor, float]:
        first = leading_basis(with_second(second), ranks[0]).columns
        better, held = leading_basis(with_first(first), ranks[1])
        return better, math.sqrt(max(0.0, 1 - held / total))

    second = leading_basis(with_first(leading_basis(rows, ranks[0]).columns), ranks[1]).columns
    if total > 0 and ranks[0] < len(rows) and ranks[1] < columns.shape[1]:
        second = descend(sweep, _extrapolate, second, sweeps=sweeps, tolerance=tolerance, step=1.0, longest=1.0)
    joined = with_second(second)
    first = leading_basis(joined, ranks[0]).columns
    core = (first.T @ joined).reshape(ranks[0], rest, ranks[1]).transpose(1, 2)
    return first, second, core.reshape(*ranks, *tensor.shape[2:])


def _extrapolate(second: Tensor, before: Tensor, step: float) -> Tensor:
    """Beyond a subspace, on the way to it from the one before."""
    moved = second - before @ (before.T @ second)
    ahead: Tensor = torch.linalg.qr(second + step * moved).Q
    return ahead
