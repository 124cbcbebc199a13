"""The weights of a chain that is close to a kernel in a Fisher metric: a start, and a fit by L-BFGS."""

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
Root = tuple[Tensor, Tensor]  # the square root of a moment of channels, and its inverse
_MULTIPLICATIONS = 5e9  # of one iteration. If it takes more, there are proportionally fewer iterations.


def decompose_in_metric(
    block: ConvSpec,
    stages: Sequence[ConvSpec],
    weight: Tensor,
    metric: KroneckerFisher,
    decompose: Callable[[Tensor], Weights],
    *,
    iterations: int,
) -> list[Tensor]:
    """Return the weights of the stages, close to the kernel ``weight`` (out, in, *kernel) of one group in a metric.

    ``decompose`` returns the weights that are close to a kernel in the Frobenius norm. Here it gets the kernel
    multiplied by the square roots of the moments of the channels. The inverses are then multiplied into the first and
    the last stage, and all stages are fitted. A first or last stage with groups cannot absorb the inverses: such a
    chain is only close in the Frobenius norm.
    """

    def shaped(kernel: Tensor) -> list[Tensor]:
        parts = zip(decompose(kernel), stages, strict=True)
        return [part.reshape(stage.out_channels, -1, *stage.kernel_size) for part, stage in parts]

    if stages[0].groups > 1 or stages[-1].groups > 1:
        return shaped(weight)
    inputs = sqrt_and_inverse(metric.input.channel_moment(block.in_channels))
    outputs = sqrt_and_inverse(metric.output.channel_moment(block.out_channels))
    first, *rest = shaped(_on_outputs(outputs[0], _on_inputs(weight, inputs[0])))
    scaled = [_on_inputs(first, inputs[1]), *rest]
    start = [*scaled[:-1], _on_outputs(outputs[1], scaled[-1])]
    if len(stages) == 1:
        return start
    matrix = as_matrix(block, weight)
    if block.transposed:
        mirrored_stages, mirrored_start = _mirror(stages, start)
        fitted = _fit(mirrored_stages, mirrored_start, matrix, metric.output, (inputs, outputs), iterations=iterations)
        return _mirror(mirrored_stages, fitted)[1]
    return _fit(stages, start, matrix, metric.input, (outputs, inputs), iterations=iterations)


def _fit(
    stages: Sequence[ConvSpec],
    start: Weights,
    matrix: Tensor,
    columns: KroneckerMoment,
    roots: tuple[Root, Root],
    *,
    iterations: int,
) -> list[Tensor]:
    """Minimise tr(G Δ C Δᵀ) over the weights of the stages, Δ being the error of the composed kernel.

    The kernel is a ``matrix`` (rows, columns). ``roots`` are those of G and of the channels of C, the moment of the
    ``columns``. The method is variable projection (Golub and Pereyra 1973): the last stage is the least-squares
    solution for the stages before it. L-BFGS with a strong Wolfe line search optimises those, in coordinates in which
    the moment of the input channels is the identity. The matrix of a transposed convolution is mirrored, so its chain
    has to be as well. Returns ``start`` if the fit is not better.
    """
    (half, back), (into, back_in) = roots
    last = _LastStage(half @ matrix, columns)
    if not last.total > 0:
        return list(start)
    inner_kernels = _inner_kernels(stages, start[0])
    parameters = [part.detach().contiguous() for part in _balance([_on_inputs(start[0], into), *start[1:-1]])]
    for parameter in parameters:
        parameter.requires_grad_()
    share = min(1.0, _MULTIPLICATIONS / last.multiplications(stages[-1].in_channels * prod(stages[-1].kernel_size)))
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=max(3, round(iterations * share)), history_size=10, tolerance_grad=1e-10,
        tolerance_change=1e-10, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def weights() -> list[Tensor]:
        return [_on_inputs(parameters[0], back_in), *parameters[1:]]

    def error() -> Tensor:
        optimizer.zero_grad()
        kernels = inner_kernels(weights())
        value, gradient = last.error(kernels.detach().flatten(1))
        torch.autograd.backward(kernels, gradient.reshape(kernels.shape))
        return value

    with torch.enable_grad():
        try:
            optimizer.step(error)  # type: ignore[no-untyped-call]
        except RuntimeError as overflow:  # of the step size in the line search
            if "overflow" not in str(overflow):
                raise
            return list(start)
    with torch.no_grad():
        fitted = [part.detach() for part in weights()]
        solved = back @ last.solve(inner_kernels(fitted).flatten(1))[0]
    fitted = _balance([*fitted, solved.reshape(start[-1].shape)])
    before, after = (float(last.missed(half @ compose_weights(stages, w).flatten(1))) for w in (start, fitted))
    return fitted if after < before else list(start)


class _LastStage:
    """The least-squares problem of the last stage: the matrix M that minimises tr((M B − T) C (M B − T)ᵀ).

    T is the target (rows, columns), C the moment of the columns, and B the kernels that the stage's inputs see.
    """

    def __init__(self, target: Tensor, columns: KroneckerMoment) -> None:
        self._target, self._columns = target, columns
        self._matrix = columns.factors[0][0] if len(columns.factors) == 1 else None
        self._weighted_target = self._weigh(target)
        self.total = float((self._weighted_target * target).sum())

    def _weigh(self, rows: Tensor) -> Tensor:
        """Return ``rows`` · C, without a detour in the common case of one factor: this is the innermost loop."""
        return self._columns.left_multiply(rows) if self._matrix is None else rows @ self._matrix

    def multiplications(self, inputs: int) -> int:
        """Return about how many multiplications ``error`` needs for this number of kernels."""
        rows, columns = self._target.shape
        return inputs * columns * (inputs + 4 * rows + sum(factor.shape[-1] for factor in self._columns.factors))

    def solve(self, kernels: Tensor) -> tuple[Tensor, Tensor]:
        """Return M and B C. The normal equations are damped by a few units of rounding of their diagonal."""
        weighted = self._weigh(kernels)
        gram = (kernels @ weighted.T).double()
        ridge = 10 * torch.finfo(kernels.dtype).eps
        least = max(float(gram.diagonal().mean()) * ridge, torch.finfo(gram.dtype).tiny)
        while True:
            damped = gram + torch.diag(ridge * gram.diagonal() + least)
            triangle, failed = torch.linalg.cholesky_ex(damped)
            if not failed or not least < float("inf"):
                break
            ridge, least = 10 * ridge, 10 * least
        right = (self._weighted_target @ kernels.T).double().T
        return torch.cholesky_solve(right, triangle).T.to(kernels), weighted

    def error(self, kernels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the relative squared error at the solution M for these kernels, and its gradient in the kernels."""
        matrix, weighted = self.solve(kernels)
        missed, weighted_missed = matrix @ kernels - self._target, matrix @ weighted - self._weighted_target
        return (missed * weighted_missed).sum() / self.total, 2 / self.total * (matrix.T @ weighted_missed)

    def missed(self, composed: Tensor) -> Tensor:
        """Return the relative squared error of a composed kernel."""
        difference = composed - self._target
        return (self._weigh(difference) * difference).sum() / self.total


def _inner_kernels(stages: Sequence[ConvSpec], like: Tensor) -> Callable[[Weights], Tensor]:
    """Return a function from the weights of all stages but the last to the kernels that the last stage's inputs see.

    The kernels are (r · k, in, *kernel) for r input channels and k kernel positions of the last stage.
    """
    free, last = stages[:-1], stages[-1]
    if last.is_pointwise:
        return lambda weights: compose_weights(free, weights)
    rows = last.in_channels * prod(last.kernel_size)
    identity = torch.eye(rows, dtype=like.dtype, device=like.device)
    identity = identity.reshape(rows, last.in_channels, *last.kernel_size)
    probed = [*free, replace(last, out_channels=rows)]
    return lambda weights: compose_weights(probed, [*weights, identity])


def _mirror(stages: Sequence[ConvSpec], weights: Weights) -> tuple[list[ConvSpec], list[Tensor]]:
    """Return the chain in reverse order, with inputs and outputs swapped. Mirroring twice gives the same chain."""
    swapped = [replace(stage, in_channels=stage.out_channels, out_channels=stage.in_channels) for stage in stages]
    turned = [to_torch(replace(stage, transposed=True), weight) for stage, weight in zip(stages, weights, strict=True)]
    return swapped[::-1], turned[::-1]


def _on_inputs(weight: Tensor, matrix: Tensor) -> Tensor:
    """Return the weight (out, in, *kernel) with its input channels multiplied by a matrix."""
    product: Tensor = torch.tensordot(weight, matrix, dims=([1], [0]))
    return product.movedim(-1, 1)


def _on_outputs(matrix: Tensor, weight: Tensor) -> Tensor:
    """Return the weight (out, in, *kernel) with its output channels multiplied by a matrix."""
    product: Tensor = torch.tensordot(matrix, weight, dims=([1], [0]))
    return product


def _balance(weights: Weights) -> list[Tensor]:
    """Return the same chain with equal norms of all weights."""
    norms = [float(part.norm()) for part in weights]
    if not min(norms) > 0:
        return list(weights)
    even = geometric_mean(norms)
    return [part * (even / norm) for part, norm in zip(weights, norms, strict=True)]
