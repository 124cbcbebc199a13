"""Canonical polyadic (CP, PARAFAC) decomposition by extrapolated, regularised alternating least squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor

from fxfact.errors import ArgumentError
from fxfact.factorizations.linalg import STRIP, leading_basis

State = TypeVar("State")
_RIDGE = 1e-6  # for a tensor of norm 1: keeps every factor bounded, and adds an error of about this size


def cp(
    tensor: Tensor, rank: int, *, sweeps: int, tolerance: float, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Return the factors of a CP decomposition (alternating least squares: Carroll and Chang 1970, Harshman 1970).

    It minimises ½‖T − T̂‖² + ½ρ Σ‖A_k‖² for ‖T‖ = 1 and ρ = 1e-6. The factors of a component have equal norms, so no
    component can grow without end (the degeneracy of De Silva and Lim 2008). A sweep solves for one factor after the
    other. Between sweeps the factors are extrapolated (see ``descend``).

    The start is the better one, after a sweep, of two: the largest singular components of the slices along the two
    largest modes, which are exact at the largest useful rank, numel / largest mode; and the eigenvectors of a matrix
    pencil, which are exact for a tensor of this rank if it does not exceed the second largest mode.

    Args:
        tensor: the tensor (n_0, n_1, …), or a matrix.
        rank: the number of components.
        sweeps: the largest number of sweeps.
        tolerance: ends the descent if a sweep lowers the relative error by less.
        generator: draws a normally distributed start instead.

    Returns:
        One factor (n_k, rank) for each mode. The sum over the rank of their outer products approximates the tensor. The
        largest temporaries are two of (rank, numel / n_0).
    """
    norm = float(tensor.double().norm())
    if norm == 0:
        return [tensor.new_zeros(size, rank) for size in tensor.shape]
    unit = tensor / norm
    factors = _start(unit, rank, generator)
    if generator is not None or rank < unit.numel() // max(unit.shape):
        factors = _sweeps(unit, factors, sweeps, tolerance)
    return [factor * norm ** (1 / tensor.ndim) for factor in factors]


def grow_cp(tensor: Tensor, factors: Sequence[Tensor], rank: int, *, sweeps: int, tolerance: float) -> list[Tensor]:
    """Return the factors of a CP decomposition that starts at one of a smaller rank.

    The added components are the largest singular components of the slices of what the smaller one misses.

    Args:
        tensor: the tensor (n_0, n_1, …).
        factors: those of the smaller rank, (n_k, smaller rank) for each mode. The smaller rank may be 0.
        rank: the number of components.
        sweeps: the largest number of sweeps.
        tolerance: ends the sweeps if one lowers the relative error by less.

    Returns:
        One factor (n_k, rank) for each mode, as ``cp`` returns them.
    """
    norm = float(tensor.double().norm())
    if norm == 0:
        return [tensor.new_zeros(size, rank) for size in tensor.shape]
    unit = tensor / norm
    known = [factor / norm ** (1 / tensor.ndim) for factor in factors]
    missed = unit - (known[0] @ khatri_rao(known[1:]).T).reshape(unit.shape)
    added = balance_components(_slices_start(missed, rank - known[0].shape[1]))
    start = [torch.cat(pair, dim=1) for pair in zip(known, added, strict=True)]
    grown = _sweeps(unit, start, sweeps, tolerance)
    return [factor * norm ** (1 / tensor.ndim) for factor in grown]


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
    """Repeat a sweep, which improves a state and returns its error, from extrapolated states.

    The extrapolation goes beyond the last state by ``step`` times its distance from the state before. If a sweep does
    not lower the error, it is undone and the step is halved. Otherwise the step grows by a tenth, up to ``longest``
    (after Ang, Cohen, Gillis and Hien 2020). The descent ends when an accepted sweep lowers the error by less than
    ``tolerance``, or after ``sweeps`` sweeps.
    """
    best, error = start, math.inf
    for _ in range(sweeps):
        found, found_error = sweep(start)
        if not found_error < error:  # also if the extrapolation led to NaN
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


def check_tolerance(tolerance: object) -> None:
    """Raise ArgumentError unless this can be the tolerance of ``descend``."""
    if not isinstance(tolerance, int | float) or not tolerance >= 0:
        raise ArgumentError(f"tolerance must be a number, at least 0, got {tolerance!r}")


def _start(tensor: Tensor, rank: int, generator: torch.Generator | None) -> list[Tensor]:
    """Return the start whose error is smaller after a sweep."""
    if generator is not None:
        return balance_components(_random_start(tensor, rank, generator))
    slices, pencil = balance_components(_slices_start(tensor, rank)), _pencil_start(tensor, rank)
    if pencil is None or rank == tensor.numel() // max(tensor.shape):
        return slices
    pencil = balance_components(pencil)
    return pencil if _sweep(tensor, pencil)[1] < _sweep(tensor, slices)[1] else slices


def _sweeps(tensor: Tensor, factors: list[Tensor], sweeps: int, tolerance: float) -> list[Tensor]:
    """Improve the factors of a tensor of norm 1 by extrapolated sweeps."""
    return descend(
        lambda start: _sweep(tensor, start),
        _extrapolate,
        factors,
        sweeps=sweeps,
        tolerance=tolerance,
        step=0.5,
        longest=2.0,
    )


def _sweep(tensor: Tensor, factors: list[Tensor]) -> tuple[list[Tensor], float]:
    """Solve for every factor once, with two large products: one for the first mode, one for all others."""
    factors = list(factors)
    flat, rank = tensor.flatten(1), factors[0].shape[1]
    factors[0] = _solve(flat @ khatri_rao(factors[1:]), factors, 0)
    contracted = (flat.T @ factors[0]).reshape(*tensor.shape[1:], rank)
    moment = contracted
    for mode in range(1, tensor.ndim):
        moment = _moment(contracted, factors, mode)
        factors[mode] = _solve(moment, factors, mode)
    del contracted
    gram = reduce(Tensor.mul_, (factor.T @ factor for factor in factors)).double().sum()
    square = 1 - 2 * (moment * factors[-1]).double().sum() + gram
    return balance_components(factors), float(square.clamp_min(0).sqrt())


def _moment(contracted: Tensor, factors: list[Tensor], mode: int) -> Tensor:
    """Return the tensor multiplied by all factors but that of ``mode``: (n_mode, rank).

    ``contracted`` (n_1, …, rank) is its product with the first factor. The rank is processed in strips, so that
    temporaries stay small.
    """
    moments = []
    for parts in zip(*(torch.split(x, STRIP, -1) for x in (contracted, *factors[1:])), strict=True):
        moment = parts[0]
        for other in reversed(range(1, len(factors))):
            if other != mode:
                alone = [1] * (other - 1) + [-1] + [1] * (moment.ndim - 1 - other) + [moment.shape[-1]]
                moment = (moment * parts[other].reshape(alone)).sum(other - 1, keepdim=True)
        moments.append(moment.reshape(-1, moment.shape[-1]))
    return torch.cat(moments, dim=1)


def _extrapolate(factors: list[Tensor], before: list[Tensor], step: float) -> list[Tensor]:
    return [now + step * (now - earlier) for now, earlier in zip(factors, before, strict=True)]


def _solve(moment: Tensor, factors: list[Tensor], mode: int) -> Tensor:
    """Solve the ridge regression for one factor: ``moment`` (n, rank) times the inverse Gram matrix of the others."""
    gram = reduce(Tensor.mul_, (factor.T @ factor for k, factor in enumerate(factors) if k != mode))
    ridge = _RIDGE
    while True:
        gram.diagonal().add_(ridge)
        triangle, failed = torch.linalg.cholesky_ex(gram)
        if not failed or not math.isfinite(ridge):
            return torch.cholesky_solve(moment.T, triangle).T
        ridge *= 10


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Return the columnwise Kronecker product (n_0 · n_1 · …, rank) of factors (n_k, rank)."""
    return reduce(lambda left, right: (left[:, None] * right[None]).flatten(0, 1), factors)


def balance_components(factors: list[Tensor]) -> list[Tensor]:
    """Return factors of the same tensor with equal norms within each component, which minimises Σ‖A_k‖²."""
    smallest = torch.finfo(factors[0].dtype).tiny  # a divisor that only changes 0 / 0
    norms = torch.stack([factor.norm(dim=0) for factor in factors]).clamp_min(smallest)
    even = norms.log().mean(dim=0).exp()
    return [factor * (even / norm) for factor, norm in zip(factors, norms, strict=True)]


def _random_start(tensor: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    draws = [torch.randn(size, rank, generator=generator, device=generator.device) for size in tensor.shape]
    return [draw.to(tensor) for draw in draws]


def _slices_start(tensor: Tensor, rank: int) -> list[Tensor]:
    """Rotate the smaller modes to their singular bases, decompose every slice, and keep the largest components."""
    modes = sorted(range(tensor.ndim), key=lambda mode: tensor.shape[mode], reverse=True)
    ordered = tensor.permute(modes)
    bases = [leading_basis(ordered.movedim(k, 0).flatten(1), ordered.shape[k]).columns for k in range(2, tensor.ndim)]
    for k, basis in enumerate(bases, start=2):
        ordered = (ordered.movedim(k, -1) @ basis).movedim(-1, k)
    pairs = []
    for flat, index in enumerate(product(*(range(size) for size in ordered.shape[2:]))):
        matrix = ordered.reshape(*ordered.shape[:2], -1)[..., flat]  # a matrix has no further modes to flatten
        right = leading_basis(matrix.T, matrix.shape[1]).columns
        left = matrix @ right
        pairs += [(size, index, j, left, right) for j, size in enumerate(left.norm(dim=0).tolist())]
    pairs = sorted(pairs, key=lambda pair: pair[0], reverse=True)[:rank]
    columns = [
        torch.stack([left[:, j] for _, _, j, left, _ in pairs], dim=1),
        torch.stack([right[:, j] for _, _, j, _, right in pairs], dim=1),
        *(basis[:, [index[k] for _, index, _, _, _ in pairs]] for k, basis in enumerate(bases)),
    ]
    missing = rank - len(pairs)
    columns = [torch.cat([column, column.new_zeros(len(column), missing)], dim=1) for column in columns]
    return [columns[modes.index(mode)] for mode in range(tensor.ndim)]


def _pencil_start(tensor: Tensor, rank: int) -> list[Tensor] | None:
    """Diagonalise two mixtures of the slices, which share their eigenvectors (Jennrich's method: Harshman 1970).

    Returns None if the rank is larger than the second largest mode, or the mixtures are singular.
    """
    modes = sorted(range(tensor.ndim), key=lambda mode: tensor.shape[mode], reverse=True)
    if not 1 < rank <= tensor.shape[modes[1]] or tensor.numel() == tensor.shape[modes[0]] * tensor.shape[modes[1]]:
        return None
    ordered = tensor.permute(modes).double()
    slices = ordered.flatten(2)
    left = leading_basis(slices.flatten(1), rank).columns
    right = leading_basis(slices.transpose(0, 1).flatten(1), rank).columns
    mixing = leading_basis(slices.flatten(0, 1).T, 2).columns
    one, other = (left.T @ (slices @ mixing[:, k]) @ right for k in (0, 1))
    quotient, singular = torch.linalg.solve_ex(one.T, other.T)
    if singular or not quotient.isfinite().all():
        return None
    first = left @ torch.linalg.eig(quotient.T).eigenvectors.real
    rest = (torch.linalg.pinv(first) @ ordered.flatten(1)).reshape(rank, *ordered.shape[1:])
    columns = [first, *_rank_one(rest)]
    return [columns[modes.index(mode)].to(tensor.dtype) for mode in range(tensor.ndim)]


def _rank_one(blocks: Tensor) -> list[Tensor]:
    """Return vectors (n, count) for each mode whose outer products are close to the tensors (count, n, …)."""
    vectors = []
    while blocks.ndim > 2:
        left, size, right = torch.linalg.svd(blocks.flatten(2), full_matrices=False)
        vectors.append(left[:, :, 0].T)
        blocks = (size[:, :1] * right[:, 0]).reshape(len(blocks), *blocks.shape[2:])
    return [*vectors, blocks.T]
