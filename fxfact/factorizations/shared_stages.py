"""Chains of several convolutions of one shape that hold the same tensors in all stages but one: a joint set.

A factorization finds the shared stages for all layers together, in the mean of their metrics. The stage that each layer
has for itself is then the least-squares solution in the layer's own metric. Layers count by what losing them costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fxfact.conv import ConvLayer, ConvSpec, KroneckerFisher, KroneckerMoment, compose_weights
from fxfact.factorizations.fit import LastStage, balance_norms, inner_kernels
from fxfact.factorizations.stages import one_group
from fxfact.factorizations.weighted_kernel import WeightedKernel


def joint_kernel(layer: ConvLayer, metric: KroneckerFisher | None) -> WeightedKernel:
    """Return the kernel of a layer without groups, in its metric and in double precision.

    Without a metric, or if it makes the norm zero, this is the Frobenius norm relative to the layer's.
    """
    block, weight = replace(one_group(layer.spec), transposed=False), layer.weight.detach().double()
    kernel = None if metric is None else WeightedKernel(block, weight, metric.like(weight), keep_sides=True)
    if kernel is None or kernel.vanishes:
        kernel = WeightedKernel(block, weight, _relative_norm(weight), keep_sides=True)
    return kernel


def _relative_norm(weight: Tensor) -> KroneckerFisher:
    """Return the metric in which the squared distance of two kernels is relative to ‖W‖²."""
    out, into, *size = weight.shape
    outputs, inputs, positions = (torch.eye(n).to(weight)[None] for n in (out, into, math.prod(size)))
    outputs = outputs / weight.square().sum().clamp_min(torch.finfo(weight.dtype).tiny)
    return KroneckerFisher(KroneckerMoment((inputs, positions)), KroneckerMoment((outputs,)))


def mean_diagonal(moment: KroneckerMoment) -> float:
    """Return the mean of the diagonal of the first group's moment."""
    return math.prod(float(diagonal[0].mean()) for diagonal in moment.diagonals)


def loss_weighted_mean(kernels: Sequence[WeightedKernel], matrices: Sequence[Tensor]) -> Tensor:
    """Return the mean of one matrix for each layer, weighed by what losing the layer costs."""
    losses = torch.tensor([kernel.total for kernel in kernels]).to(matrices[0])
    shares = losses / losses.sum() if float(losses.sum()) else torch.full_like(losses, 1 / len(losses))
    return torch.einsum("l,lab->ab", shares, torch.stack(list(matrices)))


def joint_weights(
    kernels: Sequence[WeightedKernel], stages: Sequence[ConvSpec], places: Sequence[int], shared: Sequence[Tensor]
) -> list[list[Tensor]]:
    """Return the weights of all stages for every kernel: the shared ones, and the one that is closest to the kernel.

    Args:
        kernels: the kernel of every layer.
        stages: the stages of a chain.
        places: the indices of the shared stages, all but one.
        shared: the elements of their weights.
    """
    parts = [part.reshape(stages[k].weight_shape) for k, part in zip(places, shared, strict=True)]
    own = next(k for k in range(len(stages)) if k not in places)
    solved = torch.stack([_own_weight(kernel, stages, parts, own) for kernel in kernels])
    *parts, solved = balance_norms([*parts, solved])
    return [[*parts[:own], weight, *parts[own:]] for weight in solved]


def _own_weight(kernel: WeightedKernel, stages: Sequence[ConvSpec], shared: Sequence[Tensor], own: int) -> Tensor:
    """Return the weight of one stage with which the chain is closest to the kernel. Stages after it are pointwise."""
    before, after = shared[:own], shared[own:]
    seen = inner_kernels(stages[: own + 1], kernel.weight)(before).flatten(1)
    solved, _ = LastStage(kernel).solve(seen)  # R^½ times what the stages from here on do together
    if after:
        left = kernel.outer_roots.root @ compose_weights(stages[own + 1 :], after).flatten(1)
        weight: Tensor = torch.linalg.lstsq(left, solved).solution
    else:
        weight = kernel.outer_roots.inverse @ solved
    return weight.reshape(stages[own].weight_shape)
