"""The weights of a chain that is close to a kernel in a Fisher metric: a start, and a fit by L-BFGS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from statistics import geometric_mean

import torch
from torch import Tensor

from fxfact.conv import ConvSpec, compose_weights, to_torch
from fxfact.factorizations.weighted_kernel import WeightedKernel

Weights = Sequence[Tensor]
MULTIPLICATIONS = 5e8  # of one iteration. If it takes more, there are proportionally fewer iterations.
_ROUND = 12  # iterations, after each of which the gain is looked at
LEAST_GAIN = 5e-3  # of a round, as a share of the error


def start_in_metric(
    kernel: WeightedKernel, stages: Sequence[ConvSpec], decompose: Callable[[Tensor], Weights]
) -> list[Tensor]:
    """Return weights of the stages that are close to a kernel in the metric of its channels alone.

    ``decompose`` returns the weights that are close to a kernel in the Frobenius norm. Here it gets the kernel (out,
    in, *kernel) multiplied by the square roots of the moments of the channels. The inverses are then multiplied into
    the first and the last stage. A first or last stage with groups cannot absorb the inverses: such a chain is only
    close in the Frobenius norm.
    """

    def shaped(weight: Tensor) -> list[Tensor]:
        parts = zip(decompose(weight), stages, strict=True)
        return [part.reshape(stage.out_channels, -1, *stage.kernel_size) for part, stage in parts]

    if _is_grouped_at_an_end(stages):
        return shaped(kernel.weight)
    inputs, outputs = kernel.channel_roots
    first, *rest = shaped(_on_outputs(outputs.root, _on_inputs(kernel.weight, inputs.root)))
    scaled = [_on_inputs(first, inputs.inverse), *rest]
    return [*scaled[:-1], _on_outputs(outputs.inverse, scaled[-1])]


def fit_chain(kernel: WeightedKernel, stages: Sequence[ConvSpec], start: Weights, *, iterations: int) -> list[Tensor]:
    """Minimise the loss increase over the weights of the stages.

    The method is variable projection (Golub and Pereyra 1973): the last stage is the least-squares solution for the
    stages before it. L-BFGS with a strong Wolfe line search optimises those, in coordinates in which the moment of the
    input channels is the identity. It ends when a round of iterations gains little. A transposed convolution is fitted
    as the mirrored chain.

    Returns ``start`` if the fit is not better, and for chains that cannot be fitted: those of one stage, which is the
    kernel itself, and those whose first or last stage has groups.
    """
    if len(stages) == 1 or _is_grouped_at_an_end(stages):
        return list(start)
    if not kernel.block.transposed:
        return _fit(kernel, stages, start, iterations=iterations)
    mirrored_stages, mirrored_start = _mirror(stages, start)
    return _mirror(mirrored_stages, _fit(kernel, mirrored_stages, mirrored_start, iterations=iterations))[1]


def _is_grouped_at_an_end(stages: Sequence[ConvSpec]) -> bool:
    return stages[0].groups > 1 or stages[-1].groups > 1


def _fit(kernel: WeightedKernel, stages: Sequence[ConvSpec], start: Weights, *, iterations: int) -> list[Tensor]:
    into, last = kernel.inner_roots, LastStage(kernel)
    kernels_for = inner_kernels(stages, start[0])
    parameters = [part.detach().contiguous() for part in balance_norms([_on_inputs(start[0], into.root), *start[1:-1]])]
    iterations = last.affordable(iterations, stages[-1].in_channels * prod(stages[-1].kernel_size))

    def weights() -> list[Tensor]:
        return [_on_inputs(parameters[0], into.inverse), *parameters[1:]]

    def error() -> Tensor:
        kernels = kernels_for(weights())
        value, gradient, _ = last.error(kernels.detach().flatten(1))
        torch.autograd.backward(kernels, gradient.reshape(kernels.shape))
        return value

    minimise(parameters, error, iterations)
    with torch.no_grad():
        fitted = [part.detach() for part in weights()]
        solved = kernel.outer_roots.inverse @ last.solve(kernels_for(fitted).flatten(1))[0]
    fitted = balance_norms([*fitted, solved.reshape(start[-1].shape)])
    before, after = (float(kernel.missed_by(compose_weights(stages, found).flatten(1))) for found in (start, fitted))
    return fitted if after < before else list(start)


def minimise(parameters: Sequence[Tensor], error: Callable[[], Tensor], iterations: int) -> None:
    """Minimise an error over tensors, in place, by L-BFGS with a strong Wolfe line search.

    ``error`` returns the error and adds its gradients to the tensors. The descent ends after some iterations, or when a
    round of them lowers the error by less than a small share.
    """
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=_ROUND, history_size=_ROUND, tolerance_grad=1e-10, tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        return error()

    before = float("inf")
    for done in range(0, iterations, _ROUND):
        optimizer.param_groups[0]["max_iter"] = min(_ROUND, iterations - done)
        kept = [parameter.detach().clone() for parameter in parameters]
        now = _step(optimizer, closure)
        if not all(bool(parameter.isfinite().all()) for parameter in parameters):
            now = math.nan
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.data = value
        if not before - now >= LEAST_GAIN * now:
            return
        before = now


def _step(optimizer: torch.optim.LBFGS, closure: Callable[[], Tensor]) -> float:
    """Make a step, and return the error before it, or NaN if the step size of the line search overflows."""
    try:
        with torch.enable_grad():
            return float(optimizer.step(closure))  # type: ignore[no-untyped-call]
    except RuntimeError as overflow:
        if "overflow" not in str(overflow):
            raise
        return math.nan


class LastStage:
    """The least-squares problem of the last stage: the matrix M that minimises tr((M B − T) Q (M B − T)ᵀ).

    T is the target (rows, columns) of a ``WeightedKernel``, Q the moment of its columns, and B the kernels that the
    stage's inputs see.
    """

    def __init__(self, kernel: WeightedKernel) -> None:
        self._kernel = kernel

    def affordable(self, iterations: int, inputs: int, multiplications: float = MULTIPLICATIONS) -> int:
        """Return how many of the iterations to make with this number of kernels, if one takes long."""
        rows, columns = self._kernel.target.shape
        sizes = sum(factor.shape[-1] for factor in self._kernel.columns.factors)
        needed = inputs * columns * (inputs + 4 * rows + sizes)
        return max(3, round(iterations * min(1.0, multiplications / needed)))

    def solve(self, kernels: Tensor) -> tuple[Tensor, Tensor]:
        """Return M and B Q. The normal equations are damped by a few units of rounding of their diagonal."""
        weighted = self._kernel.weigh(kernels)
        gram = (kernels @ weighted.T).double()
        ridge = 10 * torch.finfo(kernels.dtype).eps
        least = max(float(gram.diagonal().mean()) * ridge, torch.finfo(gram.dtype).tiny)
        while True:
            damped = gram + torch.diag(ridge * gram.diagonal() + least)
            triangle, failed = torch.linalg.cholesky_ex(damped)
            if not failed or not least < float("inf"):
                break
            ridge, least = 10 * ridge, 10 * least
        right = (self._kernel.weighted_target @ kernels.T).double().T
        return torch.cholesky_solve(right, triangle).T.to(kernels), weighted

    def error(self, kernels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the relative squared error at the solution for these kernels, its gradient in them, and M."""
        matrix, weighted = self.solve(kernels)
        missed = matrix @ kernels - self._kernel.target
        weighted_missed = matrix @ weighted - self._kernel.weighted_target
        total = self._kernel.total
        return (missed * weighted_missed).sum() / total, 2 / total * (matrix.T @ weighted_missed), matrix


def inner_kernels(stages: Sequence[ConvSpec], like: Tensor) -> Callable[[Weights], Tensor]:
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


def balance_norms(weights: Weights) -> list[Tensor]:
    """Return the same chain with equal norms of all weights."""
    norms = [float(part.norm()) for part in weights]
    if not min(norms) > 0:
        return list(weights)
    even = geometric_mean(norms)
    return [part * (even / norm) for part, norm in zip(weights, norms, strict=True)]
