"""A chain's weights, fitted in a metric: from the Frobenius norm to that of channels, and from there all the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxfact.conv import ConvSpec, compose_weights
from fxfact.metric.base import Metric, root

Weights = Sequence[Tensor]


def in_channel_metric(
    block: ConvSpec, weight: Tensor, metric: Metric, decompose: Callable[[Tensor], Weights]
) -> list[Tensor]:
    """``decompose``, which is near in the Frobenius norm, made near in the metric of the channels alone.

    The kernel (out, in, *kernel) goes in multiplied by the square roots of both moments of channels; what comes out is
    the stages' weights, of which the first is multiplied by the inverse on its inputs, the last on its outputs.
    """
    (into, back_in), (out, back_out) = _channel_roots(block, metric)
    return _scaled(decompose(_scaled([weight], into, out)[0]), back_in, back_out)


def fit(
    block: ConvSpec, stages: Sequence[ConvSpec], start: Weights, weight: Tensor, metric: Metric, *, iterations: int
) -> list[Tensor]:
    """The stages' weights that bring their composed kernel near to ``weight``, in the whole metric, begun at ``start``.

    Minimises tr(G Δ C Δᵀ) by L-BFGS (torch.optim, strong Wolfe line search) over the weights of all stages at once,
    in coordinates in which the moments of channels are identities. Ends at ``start`` where that was better.
    """
    (into, back_in), (out, back_out) = _channel_roots(block, metric)
    total = float(metric.square(block, weight))
    if not total > 0:
        return list(start)
    parameters = [part.detach().contiguous().requires_grad_() for part in _balanced(_scaled(start, into, out))]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=iterations, history_size=10, tolerance_grad=1e-10, tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def error() -> Tensor:
        optimizer.zero_grad()
        kernel = compose_weights(stages, _scaled(parameters, back_in, back_out))
        with torch.no_grad():
            difference = kernel - weight
            gradient = 2 / total * _gradient(block, difference, metric)
            value = (gradient * difference).sum() / 2
        torch.autograd.backward(kernel, gradient)
        return value

    with torch.enable_grad():
        before = float(error())
        optimizer.step(error)  # type: ignore[no-untyped-call]
        after = float(error())
    if not after < before:
        return list(start)
    return [part.detach() for part in _scaled(parameters, back_in, back_out)]


def _gradient(block: ConvSpec, difference: Tensor, metric: Metric) -> Tensor:
    """G Δ C, in the layout of the kernel."""
    rows, columns = metric.sides(block)
    matrix = difference.transpose(0, 1) if block.transposed else difference
    product = rows.after(columns.after(matrix.flatten(1)).T).T.reshape(matrix.shape)
    return product.transpose(0, 1) if block.transposed else product


def _channel_roots(block: ConvSpec, metric: Metric) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Square roots, and their inverses, of the moments of the input and of the output channels."""
    return root(metric.input.channels(block.in_channels)), root(metric.output.channels(block.out_channels))


def _scaled(weights: Weights, into: Tensor, out: Tensor) -> list[Tensor]:
    """The weights, the first multiplied on its input channels, the last on its output channels."""
    first = torch.tensordot(weights[0], into, dims=([1], [0])).movedim(-1, 1)
    scaled = [first, *weights[1:]]
    scaled[-1] = torch.tensordot(out, scaled[-1], dims=([1], [0]))
    return scaled


def _balanced(weights: Weights) -> list[Tensor]:
    """The same chain with equal norms of all stages."""
    norms = [float(part.norm()) for part in weights]
    if not min(norms) > 0:
        return list(weights)
    even = torch.tensor(norms, dtype=torch.float64).log().mean().exp().item()
    return [part * (even / norm) for part, norm in zip(weights, norms, strict=True)]
