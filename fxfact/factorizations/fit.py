"""A chain's weights, fitted in a metric: from the Frobenius norm to that of channels, and from there all the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from statistics import geometric_mean

import torch
from torch import Tensor

from fxfact.conv import (
    ConvSpec,
    KroneckerFisher,
    KroneckerMoment,
    as_matrix,
    compose_weights,
    sqrt_and_inverse,
    to_torch,
)

Weights = Sequence[Tensor]
_WORK = 5e9  # multiplications of an iteration, beyond which there are fewer of them


def in_channel_metric(
    block: ConvSpec, weight: Tensor, metric: KroneckerFisher, decompose: Callable[[Tensor], Weights]
) -> list[Tensor]:
    """``decompose``, which is near in the Frobenius norm, made near in the metric of the channels alone.

    The kernel (out, in, *kernel) goes in multiplied by the square roots of both moments of channels; what comes out is
    the stages' weights, of which the first is multiplied by the inverse on its inputs, the last on its outputs.
    """
    into, back_in = sqrt_and_inverse(metric.input.channels(block.in_channels))
    out, back_out = sqrt_and_inverse(metric.output.channels(block.out_channels))
    first, *rest = decompose(_on_outputs(out, _on_inputs(weight, into)))
    scaled = [_on_inputs(first, back_in), *rest]
    return [*scaled[:-1], _on_outputs(back_out, scaled[-1])]


def fit_chain(
    block: ConvSpec,
    stages: Sequence[ConvSpec],
    start: Weights,
    weight: Tensor,
    metric: KroneckerFisher,
    *,
    iterations: int,
) -> list[Tensor]:
    """The stages' weights that bring their composed kernel near to ``weight``, in the whole metric, begun at ``start``.

    Minimises tr(G Δ C Δᵀ) by variable projection (Golub and Pereyra 1973): the last stage is the least-squares solution
    for those before it, over whose weights L-BFGS (torch.optim, strong Wolfe line search) runs, in coordinates in which
    the moment of the first's channels is the identity. Of a transposed convolution, whose matrix is the mirror image,
    it is the first stage that is solved for. Ends at ``start`` where that was better. Where an iteration takes more
    than 5·10⁹ multiplications there are as many times fewer ``iterations``, though three at least.
    """
    if len(stages) == 1:
        return list(start)
    if block.transposed:
        mirrored = _mirrored(stages, start)
        found = _fit(block, mirrored, weight, metric, iterations=iterations)
        return _mirrored(mirrored[0], found)[1]
    return _fit(block, (stages, start), weight, metric, iterations=iterations)


def _fit(
    block: ConvSpec,
    chain: tuple[Sequence[ConvSpec], Weights],
    weight: Tensor,
    metric: KroneckerFisher,
    *,
    iterations: int,
) -> list[Tensor]:
    """The weights for a chain of stages and their weights to begin at, whose last stage is solved for."""
    stages, start = chain
    rows, columns = metric.sides(block)
    half, back = sqrt_and_inverse(rows.factors[0][0])
    last = _LastStage(half @ as_matrix(block, weight), columns)
    if not last.total > 0:
        return list(start)
    into, back_in = sqrt_and_inverse(columns.channels(stages[0].in_channels))
    free, rest = stages[:-1], stages[-1]
    parameters = [part.detach().contiguous() for part in _balanced([_on_inputs(start[0], into), *start[1:-1]])]
    for parameter in parameters:
        parameter.requires_grad_()
    share = min(1.0, _WORK / last.multiplications(rest.in_channels * prod(rest.kernel_size)))
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=max(3, round(iterations * share)), history_size=10, tolerance_grad=1e-10,
        tolerance_change=1e-10, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def weights() -> list[Tensor]:
        return [_on_inputs(parameters[0], back_in), *parameters[1:]]

    def error() -> Tensor:
        optimizer.zero_grad()
        kernels = _seen_by(free, weights(), rest)
        value, gradient = last.error(kernels.detach().flatten(1))
        torch.autograd.backward(kernels, gradient.reshape(kernels.shape))
        return value

    with torch.enable_grad():
        optimizer.step(error)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        found = [part.detach() for part in weights()]
        solved = back @ last.solved(_seen_by(free, found, rest).flatten(1))[0]
    found = _balanced([*found, solved.reshape(start[-1].shape)])
    before, after = (float(last.missed(half @ compose_weights(stages, w).flatten(1))) for w in (start, found))
    return found if after < before else list(start)


class _LastStage:
    """The last stage, rows for rows: with B the kernels that its inputs see, M of tr((M B − T) C (M B − T)ᵀ) least."""

    def __init__(self, target: Tensor, columns: KroneckerMoment) -> None:
        self._target, self._columns = target, columns
        self._wanted = columns.after(target)
        self.total = float((self._wanted * target).sum())

    def multiplications(self, inputs: int) -> int:
        """About as many as ``error`` takes for that many kernels."""
        rows, columns = self._target.shape
        return inputs * columns * (inputs + 4 * rows + sum(factor.shape[-1] for factor in self._columns.factors))

    def solved(self, kernels: Tensor) -> tuple[Tensor, Tensor]:
        """M, and B C. The normal equations are damped by some units of rounding of their diagonal."""
        seen = self._columns.after(kernels)
        gram = (kernels @ seen.T).double()
        ridge = 10 * torch.finfo(kernels.dtype).eps
        least = max(float(gram.diagonal().mean()) * ridge, torch.finfo(gram.dtype).tiny)
        while True:
            damped = gram + torch.diag(ridge * gram.diagonal() + least)
            triangle, failed = torch.linalg.cholesky_ex(damped)
            if not failed or not least < float("inf"):
                break
            ridge, least = 10 * ridge, 10 * least
        right = (self._wanted @ kernels.T).double().T
        return torch.cholesky_solve(right, triangle).T.to(kernels), seen

    def error(self, kernels: Tensor) -> tuple[Tensor, Tensor]:
        """The part of the target that is missed, and its gradient by the kernels, M being the solution for them."""
        matrix, seen = self.solved(kernels)
        missed, weighed = matrix @ kernels - self._target, matrix @ seen - self._wanted
        return (missed * weighed).sum() / self.total, 2 / self.total * (matrix.T @ weighed)

    def missed(self, found: Tensor) -> Tensor:
        """The part of the target that something found misses."""
        difference = found - self._target
        return (self._columns.after(difference) * difference).sum() / self.total


def _seen_by(stages: Sequence[ConvSpec], weights: Weights, last: ConvSpec) -> Tensor:
    """The kernels (r · k, in, *kernel) of what the positions k of the last stage's kernel see, in its r channels."""
    if last.is_pointwise:
        return compose_weights(stages, weights)
    rows = last.in_channels * prod(last.kernel_size)
    every = torch.eye(rows, dtype=weights[0].dtype, device=weights[0].device)
    shape = (rows, last.in_channels, *last.kernel_size)
    return compose_weights([*stages, replace(last, out_channels=rows)], [*weights, every.reshape(shape)])


def _mirrored(stages: Sequence[ConvSpec], weights: Weights) -> tuple[list[ConvSpec], list[Tensor]]:
    """The chain from its end to its beginning, inputs for outputs. What is mirrored twice is what it was."""
    turned = [replace(stage, in_channels=stage.out_channels, out_channels=stage.in_channels) for stage in stages]
    swapped = [to_torch(replace(stage, transposed=True), weight) for stage, weight in zip(stages, weights, strict=True)]
    return turned[::-1], swapped[::-1]


def _on_inputs(weight: Tensor, matrix: Tensor) -> Tensor:
    """The weight (out, in, *kernel), its input channels multiplied."""
    product: Tensor = torch.tensordot(weight, matrix, dims=([1], [0]))
    return product.movedim(-1, 1)


def _on_outputs(matrix: Tensor, weight: Tensor) -> Tensor:
    """The weight (out, in, *kernel), its output channels multiplied."""
    product: Tensor = torch.tensordot(matrix, weight, dims=([1], [0]))
    return product


def _balanced(weights: Weights) -> list[Tensor]:
    """The same chain with equal norms of all stages."""
    norms = [float(part.norm()) for part in weights]
    if not min(norms) > 0:
        return list(weights)
    even = geometric_mean(norms)
    return [part * (even / norm) for part, norm in zip(weights, norms, strict=True)]
