"""Canonical polyadic (CP, PARAFAC) decomposition by extrapolated, regularised alternating least squares."""

from __future__ import annotations

import math
from functools import reduce
from itertools import product

import torch
from torch import Tensor

from fxfact.factorizations.linalg import STRIP, descend, leading_basis, tiny

_RIDGE = 1e-6  # times the squared norm of the tensor's scale: keeps every factor bounded, biases by about as much


def cp(
    tensor: Tensor, rank: int, *, sweeps: int, tolerance: float, random: torch.Generator | None = None
) -> list[Tensor]:
    """One factor (n_k, rank) per mode; the sum over the rank of their outer products approximates ``tensor``.

    Minimises ½‖T − T̂‖² + ½ρ Σ‖A_k‖² with ‖T‖ = 1 and ρ = 1e-6, the factors of a component having equal norms, so
    that no component can run away (the degeneracy of De Silva and Lim 2008). A sweep solves for one factor after the
    other; the factors are extrapolated between sweeps and the end is decided as ``descend`` says.

    It begins at the nearer, after a sweep, of two: the largest singular components of the slices that hold the two
    largest modes, exact at the largest useful rank, numel / largest mode; and the eigenvectors of a matrix pencil,
    exact for a tensor of this rank, if that is no larger than the second largest mode. With ``random`` it begins at
    normal values drawn from that generator. The largest temporaries are two of (rank, numel / n_0).
    """
    norm = float(tensor.double().norm())
    if norm == 0:
        return [tensor.new_zeros(size, rank) for size in tensor.shape]
    unit = tensor / norm
    factors = _begin(unit, rank, random)
    if random is not None or rank < unit.numel() // max(unit.shape):
        factors = descend(
            lambda start: _sweep(unit, start),
            _extrapolate,
            factors,
            sweeps=sweeps,
            tolerance=tolerance,
            step=0.5,
            longest=2.0,
        )
    return [factor * norm ** (1 / tensor.ndim) for factor in factors]


def _begin(tensor: Tensor, rank: int, random: torch.Generator | None) -> list[Tensor]:
    """The start that is nearer after a sweep, before that sweep."""
    if random is not None:
        return _balanced(_begin_random(tensor, rank, random))
    slices, pencil = _balanced(_begin_at_slices(tensor, rank)), _begin_at_pencil(tensor, rank)
    if pencil is None or rank == tensor.numel() // max(tensor.shape):
        return slices
    pencil = _balanced(pencil)
    return pencil if _sweep(tensor, pencil)[1] < _sweep(tensor, slices)[1] else slices


def _sweep(tensor: Tensor, factors: list[Tensor]) -> tuple[list[Tensor], float]:
    """Every factor once, by two large products: one for the first mode, one that serves all others."""
    factors = list(factors)
    flat, rank = tensor.flatten(1), factors[0].shape[1]
    factors[0] = _solve(flat @ _khatri_rao(factors[1:]), factors, 0)
    contracted = (flat.T @ factors[0]).reshape(*tensor.shape[1:], rank)
    moment = contracted
    for mode in range(1, tensor.ndim):
        moment = _moment(contracted, factors, mode)
        factors[mode] = _solve(moment, factors, mode)
    del contracted
    gram = reduce(Tensor.mul_, (factor.T @ factor for factor in factors)).double().sum()
    square = 1 - 2 * (moment * factors[-1]).double().sum() + gram
    return _balanced(factors), float(square.clamp_min(0).sqrt())


def _moment(contracted: Tensor, factors: list[Tensor], mode: int) -> Tensor:
    """The tensor, whose product with the first factor is ``contracted`` (n_1, …, rank), times all others but one.

    Gives (n_mode, rank). In strips of the rank, whose temporaries are small.
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
    """The ridge least squares for one factor: moment (n, rank) times the inverse of the others' Gram matrix."""
    gram = reduce(Tensor.mul_, (factor.T @ factor for k, factor in enumerate(factors) if k != mode))
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
    bases = [leading_basis(ordered.movedim(k, 0).flatten(1), ordered.shape[k]).columns for k in range(2, tensor.ndim)]
    for k, basis in enumerate(bases, start=2):
        ordered = (ordered.movedim(k, -1) @ basis).movedim(-1, k)
    pairs = []
    for flat, index in enumerate(product(*(range(size) for size in ordered.shape[2:]))):
        matrix = ordered.flatten(2)[..., flat]
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


def _begin_at_pencil(tensor: Tensor, rank: int) -> list[Tensor] | None:
    """Simultaneous diagonalisation (Harshman 1970, Jennrich): two mixtures of the slices share their eigenvectors.

    None where the rank is larger than the second largest mode, or the mixtures are singular.
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
    """For each of the tensors (count, n, …), vectors (n, count) per mode whose outer product is near it."""
    vectors = []
    while blocks.ndim > 2:
        left, size, right = torch.linalg.svd(blocks.flatten(2), full_matrices=False)
        vectors.append(left[:, :, 0].T)
        blocks = (size[:, :1] * right[:, 0]).reshape(len(blocks), *blocks.shape[2:])
    return [*vectors, blocks.T]
