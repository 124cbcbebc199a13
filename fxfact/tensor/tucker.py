"""Tucker decomposition over the first two modes, the later ones kept whole."""

from __future__ import annotations

import torch
from torch import Tensor

from fxfact.tensor.base import leading_basis


def partial_tucker(
    tensor: Tensor, ranks: tuple[int, int], *, sweeps: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``first`` (n_0, r_0), ``second`` (n_1, r_1), orthonormal, and ``core`` (r_0, r_1, *rest).

    Higher-order orthogonal iteration (De Lathauwer, De Moor and Vandewalle 2000) on Gram matrices, begun at the
    sequentially truncated higher-order SVD. A sweep replaces both bases and never raises the error; the iteration
    ends when a sweep lowers the relative error by less than ``tolerance``, or after ``sweeps`` of them. Exact at full
    ranks.
    """
    whole = tensor.flatten(2)
    first = leading_basis(whole.flatten(1), ranks[0])
    second = leading_basis(_project_first(whole, first).transpose(0, 1).flatten(1), ranks[1])
    error = _relative_error(whole, first, second)
    for _ in range(sweeps if ranks[0] < len(first) and ranks[1] < len(second) else 0):
        first = leading_basis(_project_second(whole, second).flatten(1), ranks[0])
        second = leading_basis(_project_first(whole, first).transpose(0, 1).flatten(1), ranks[1])
        previous, error = error, _relative_error(whole, first, second)
        if previous - error < tolerance:
            break
    core = _project_second(_project_first(whole, first), second)
    return first, second, core.reshape(*ranks, *tensor.shape[2:])


def _project_first(whole: Tensor, first: Tensor) -> Tensor:
    return (first.T @ whole.flatten(1)).reshape(first.shape[1], *whole.shape[1:])


def _project_second(whole: Tensor, second: Tensor) -> Tensor:
    return torch.einsum("oik,ir->ork", whole, second)


def _relative_error(whole: Tensor, first: Tensor, second: Tensor) -> float:
    """By Pythagoras: the bases are orthonormal, so what the core holds and what it misses are orthogonal."""
    total = whole.double().pow(2).sum()
    held = _project_second(_project_first(whole, first), second).double().pow(2).sum()
    return float((1 - held / total).clamp_min(0).sqrt()) if total > 0 else 0.0
