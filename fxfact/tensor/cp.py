"""Canonical polyadic (CP, PARAFAC) decomposition by extrapolated, regularised alternating least squares."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from itertools import product

import torch
from torch import Tensor

from fxfact.tensor.base import leading_basis, tiny

_RIDGE = 1e-6  # times the squared norm of the tensor's scale: keeps every factor bounded, biases by about as much


def cp(
    tensor: Tensor, rank: int, *, sweeps: int, tolerance: float, random: torch.Generator | None = None
) -> list[Tensor]:
    """One factor (n_k, rank) per mode; the sum over the rank of their outer products approximates ``tensor``.

    Minimises ½‖T − T̂‖² + ½ρ Σ‖A_k‖² with ‖T‖ = 1 and ρ = 1e-6, the factors of a component having equal norms, so
    that no component can run away (the degeneracy of De Silva and Lim 2008). A sweep solves for one factor after the
    other; between sweeps the factors are extrapolated, and a sweep that does not lower the error is undone and the
    extrapolation shortened (after Ang, Cohen, Gillis and Hien 2020). It ends when an accepted sweep lowers the relative
    error by less than ``tolerance``, or after ``sweeps`` of them. Begins at the largest singular components of the
    slices that hold the two largest modes, which is exact at the largest useful rank, numel / largest mode, or, where
    that is nearer after a sweep, at the eigenvectors of a matrix pencil, which are exact for a tensor that has this
    rank, if it is no larger than the second largest mode; with ``random``, at normal values drawn from that generator. The largest temporary is one (rank, numel / n_0).
    """
    norm = float(tensor.double().norm())
    if norm == 0:
        return [tensor.new_zeros(size, rank) for size in tensor.shape]
    unit = tensor / norm
    starts = [_begin_at_slices(unit, rank)] if random is None else [_begin_random(unit, rank, random)]
    factors = _balanced(starts[0])
    if random is not None or rank < unit.numel() // max(unit.shape):
        starts += [start] if random is None and (start := _begin_at_pencil(unit, rank)) else []
        swept = [_sweep(unit, _balanced(start)) for start in starts]
        factors, _ = min(swept, key=lambda found: found[1] if math.isfinite(found[1]) else math.inf)
        factors = _minimise(lambda start: _sweep(unit, start), factors, sweeps - 1, tolerance)
    return [factor * norm ** (1 / tensor.ndim) for factor in factors]


def _minimise(
    sweep: Callable[[list[Tensor]], tuple[list[Tensor], float]], start: list[Tensor], sweeps: int, tolerance: float
) -> list[Tensor]:
    best, error, step = start, math.inf, 0.5
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
        start = best if math.isinf(gain) else [a + step * (a - b) for a, b in zip(best, previous, strict=True)]
        step = min(step * 1.1, 2.0)
    return best


def _sweep(tensor: Tensor, factors: list[Tensor]) -> tuple[list[Tensor], float]:
    """Every factor once, by two large products: one for the first mode, one that serves all others."""
    factors = list(factors)
    flat, rank = tensor.flatten(1), factors[0].shape[1]
    factors[0] = _solve(flat @ _khatri_rao(factors[1:]), factors, 0)
    contracted = (flat.T @ factors[0]).reshape(*tensor.shape[1:], rank)
    moment = contracted
    for mode in range(1, tensor.ndim):
        moment = contracted
        for other in reversed(range(1, tensor.ndim)):
            if other != mode:
                shape = [1] * (other - 1) + [-1] + [1] * (moment.ndim - 1 - other) + [rank]
                moment = (moment * factors[other].reshape(shape)).sum(other - 1, keepdim=True)
        moment = moment.reshape(-1, rank)
        factors[mode] = _solve(moment, factors, mode)
    gram = reduce(torch.mul, (factor.T @ factor for factor in factors)).double().sum()
    square = 1 - 2 * (moment * factors[-1]).double().sum() + gram
    return _balanced(factors), float(square.clamp_min(0).sqrt())


def _solve(moment: Tensor, factors: list[Tensor], mode: int) -> Tensor:
    """The ridge least squares for one factor: moment (n, rank) times the inverse of the others' Gram matrix."""
    gram = reduce(torch.mul, (factor.T @ factor for k, factor in enumerate(factors) if k != mode))
    ridge = _RIDGE
    while True:
        gram.diagonal().add_(ridge)
        triangle, failed = torch.linalg.cholesky_ex(gram)
        if not failed or not math.isfinite(ridge):
            return torch.cholesky_solve(moment.T, triangle).T
        ridge *= 10


def _khatri_rao(factors: list[Tensor]) -> Tensor:
    rank = factors[0].shape[1]
    return reduce(lambda left, right: (left[:, None] * right[None]).reshape(-1, rank), factors)


def _balanced(factors: list[Tensor]) -> list[Tensor]:
    """The same tensor with equal norms within each component, which makes Σ‖A_k‖² least."""
    norms = torch.stack([factor.norm(dim=0) for factor in factors]).clamp_min(tiny(factors[0]))
    even = norms.log().mean(dim=0).exp()
    return [factor * (even / norm) for factor, norm in zip(factors, norms, strict=True)]


def _begin_random(tensor: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    draws = [torch.randn(size, rank, generator=generator, device=generator.device) for size in tensor.shape]
    return [draw.to(tensor) for draw in draws]


def _begin_at_slices(tensor: Tensor, rank: int) -> list[Tensor]:
    """Rotate the smaller modes to their singular bases, decompose each slice, keep the largest components of all."""
    modes = sorted(range(tensor.ndim), key=lambda mode: tensor.shape[mode], reverse=True)
    ordered = tensor.permute(modes)
    bases = [leading_basis(ordered.movedim(k, 0).flatten(1), ordered.shape[k]) for k in range(2, tensor.ndim)]
    for k, basis in enumerate(bases, start=2):
        ordered = (ordered.movedim(k, -1) @ basis).movedim(-1, k)
    pairs = []
    for flat, index in enumerate(product(*(range(size) for size in ordered.shape[2:]))):
        matrix = ordered.flatten(2)[..., flat]
        right = leading_basis(matrix.T, matrix.shape[1])
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


def _begin_at_pencil(tensor: Tensor, rank: int) -> list[Tensor] | None:
    """Simultaneous diagonalisation (Harshman 1970, Jennrich): two mixtures of the slices share their eigenvectors.

    None where the rank is larger than the second largest mode, or the mixtures are singular.
    """
    modes = sorted(range(tensor.ndim), key=lambda mode: tensor.shape[mode], reverse=True)
    ordered = tensor.permute(modes).double()
    slices = ordered.flatten(2)
    if not 1 < rank <= ordered.shape[1] or slices.shape[2] < 2:
        return None
    left = leading_basis(slices.flatten(1), rank)
    right = leading_basis(slices.transpose(0, 1).flatten(1), rank)
    mixing = leading_basis(slices.flatten(0, 1).T, 2)
    one, other = (left.T @ (slices @ mixing[:, k]) @ right for k in (0, 1))
    quotient, singular = torch.linalg.solve_ex(one.T, other.T)
    if singular or not quotient.isfinite().all():
        return None
    first = left @ torch.linalg.eig(quotient.T).eigenvectors.real
    rest = (torch.linalg.pinv(first) @ ordered.flatten(1)).reshape(rank, *ordered.shape[1:])
    columns = [first, *_rank_one(rest)]
    return [columns[modes.index(mode)].to(tensor.dtype) for mode in range(tensor.ndim)]


def _rank_one(blocks: Tensor) -> list[Tensor]:
    """For each of the tensors (count, n, …), vectors (n, count) per mode whose outer product is near it."""
    vectors = []
    while blocks.ndim > 2:
        left, size, right = torch.linalg.svd(blocks.flatten(2), full_matrices=False)
        vectors.append(left[:, :, 0].T)
        blocks = (size[:, :1] * right[:, 0]).reshape(len(blocks), *blocks.shape[2:])
    return [*vectors, blocks.T]
