"""Regularizers of the ranks of factorized layers: tensor dropout and tensor lasso, and the pruning of ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from fxfact.conv import ConvLayer, compose_weights
from fxfact.errors import ArgumentError, ArgumentTypeError, RefusedError
from fxfact.factorizations import Rank, Tucker
from fxfact.nn.joint import JointConv, SharedConv
from fxfact.nn.rank_gains import RankDropout, RankLasso, rank_stages
from fxfact.nn.staged_conv import StagedConv
from fxfact.nn.structure import Structure

M = TypeVar("M", bound=nn.Module)


def tensor_dropout(
    layer_or_model: M, p: float = 0.0, *, min_dim: int = 3, min_values: int = 1, drop_test: bool = False
) -> M:
    """Drop rank indices at random while training (Kolbeinsson et al. 2021).

    Every forward draws the same indices for all samples. What is kept is divided by 1 - p.

    Args:
        layer_or_model: a factorized layer, or a model: then all of its factorized layers. It is changed in place.
        p: the probability with which an index is dropped, at least 0 and below 1.
        min_dim: ranks up to this size are left alone.
        min_values: how many indices of a rank are kept at least.
        drop_test: whether indices are dropped in evaluation mode as well.

    Returns:
        ``layer_or_model``.

    Raises:
        ArgumentError: if an argument is out of its range.
        ArgumentTypeError: if there is no factorized layer.
        RefusedError: if there is a joint layer.
    """
    layers = _layers_with_own_ranks(layer_or_model)
    dropouts = [RankDropout(p, min_dim, min_values, drop_test).train(layer.training) for layer in layers]
    for layer, dropout in zip(layers, dropouts, strict=True):
        layer.rank_dropout = dropout
    return layer_or_model


def remove_tensor_dropout(layer_or_model: M) -> M:
    """Remove tensor dropout.

    Args:
        layer_or_model: a factorized layer, or a model. It is changed in place.

    Returns:
        ``layer_or_model``.

    Raises:
        ArgumentTypeError: if there is no factorized layer.
    """
    for layer in _layers_of(layer_or_model):
        layer.rank_dropout = None
    return layer_or_model


def tensor_lasso(layer_or_model: M, *, clamp_weights: bool = True, threshold: float = 1e-6) -> M:
    """Give every rank index a gain to train, which ``lasso_loss`` draws towards zero.

    The gains are parameters, and begin at 1: make the optimizer afterwards. A gain that falls to the threshold is zero
    from then on, and ``prune_ranks`` removes its index.

    Args:
        layer_or_model: a factorized layer, or a model: then all of its factorized layers. It is changed in place.
        clamp_weights: whether no gain exceeds 1.
        threshold: the largest value that counts as zero.

    Returns:
        ``layer_or_model``.

    Raises:
        ArgumentError: if the threshold is not between 0 and 1, or a layer has a lasso already.
        ArgumentTypeError: if there is no factorized layer.
        RefusedError: if there is a joint layer.
    """
    layers = _layers_with_own_ranks(layer_or_model)
    if any(layer.rank_lasso is not None for layer in layers):
        raise ArgumentError("a layer has a lasso already. Call remove_tensor_lasso first, which keeps its effect.")
    made = []
    for layer in layers:
        like = next(iter(layer.parameters()))
        made.append(RankLasso(rank_stages(layer.structure), like, clamp_weights, threshold))
    for layer, lasso in zip(layers, made, strict=True):
        layer.rank_lasso = lasso
    return layer_or_model


def lasso_loss(layer_or_model: nn.Module, penalty: float = 0.01, *, normalize_loss: bool = True) -> Tensor:
    """Return the penalty of the gains of ``tensor_lasso``, to be added to the loss of the training.

    Args:
        layer_or_model: a layer, or a model, with a lasso.
        penalty: the factor.
        normalize_loss: whether the sum of the gains is divided by their number.

    Returns:
        The penalty times the sum or the mean of the gains, a scalar.

    Raises:
        ArgumentError: if no layer has a lasso.
        ArgumentTypeError: if there is no factorized layer.
    """
    parts = [layer.rank_lasso.sum_and_count() for layer in _layers_of(layer_or_model) if layer.rank_lasso is not None]
    if not parts:
        raise ArgumentError("no layer has a lasso. Call tensor_lasso first.")
    total = torch.stack([part for part, _ in parts]).sum()
    return penalty * total / (sum(count for _, count in parts) if normalize_loss else 1)


def remove_tensor_lasso(layer_or_model: M) -> M:
    """Remove the gains of ``tensor_lasso``. The weights of the stages are multiplied with them first.

    Args:
        layer_or_model: a factorized layer, or a model. It is changed in place, and computes the same.

    Returns:
        ``layer_or_model``.

    Raises:
        ArgumentTypeError: if there is no factorized layer.
    """
    for layer in _layers_of(layer_or_model):
        layer.absorb_lasso()
    return layer_or_model


def prune_ranks(layer_or_model: M) -> M:
    """Return a copy without the rank indices that contribute nothing: those with a zero gain or only zero weights.

    At least one index of every rank is kept. A layer with groups keeps an index that any group needs.

    Args:
        layer_or_model: a factorized layer, or a model: then all of its factorized layers. It is not changed.

    Returns:
        The copy, which computes the same. Its layers have smaller ranks and no lasso.

    Raises:
        ArgumentTypeError: if there is no factorized layer.
    """
    memo: dict[int, object] = {id(layer): _pruned(layer) for layer in _layers_of(layer_or_model)}
    return copy.deepcopy(layer_or_model, memo)


def _layers_with_own_ranks(layer_or_model: nn.Module) -> list[StagedConv]:
    """Return the factorized layers. Raises RefusedError for a joint layer, whose convolutions have one rank."""
    modules = layer_or_model.named_modules() if isinstance(layer_or_model, nn.Module) else ()
    if name := next((name or "it" for name, module in modules if isinstance(module, JointConv | SharedConv)), None):
        raise RefusedError(
            f"{name} is a joint layer, whose convolutions share their ranks. Pass the other layers one by one, or put "
            "fxfact.nn.TuckerConv.from_conv(joint[i].to_conv(), rank) in the place of joint[i]."
        )
    return _layers_of(layer_or_model)


def _layers_of(layer_or_model: nn.Module) -> list[StagedConv]:
    modules = layer_or_model.modules() if isinstance(layer_or_model, nn.Module) else ()
    layers = [module for module in modules if isinstance(module, StagedConv)]
    if not layers:
        name = type(layer_or_model).__name__
        raise ArgumentTypeError(f"{name} has no factorized layer of fxfact.nn. Pass a layer, or a model with some.")
    return layers


@torch.no_grad()
def _pruned(layer: StagedConv) -> StagedConv:
    weights = [weight.detach() for weight in layer.stage_weights()]
    structure, weights = _without_zeros(layer.structure, weights)
    new = layer.with_stages(structure, weights)
    new.rank_dropout = copy.deepcopy(layer.rank_dropout)
    for name in layer.stage_names:
        trained = layer.get_parameter(f"{name}.weight").requires_grad
        new.get_parameter(f"{name}.weight").requires_grad_(trained)
    return new


def _without_zeros(structure: Structure, weights: Sequence[Tensor]) -> tuple[Structure, list[Tensor]]:
    """Return the structure and the weights of a layer without the rank indices that are zero."""
    spec, stages, weights = structure.spec, list(structure.stages), list(weights)
    firsts = list(rank_stages(structure))
    for first, after in zip(firsts, [*firsts[1:], len(stages) - 1], strict=True):
        # The channels go from the rows of stage `first` through depthwise stages to the columns of stage `after`.
        alive = torch.stack([weight.flatten(1).any(1) for weight in weights[first:after]]).all(0)
        rows = weights[after].transpose(0, 1).flatten(1).any(1) if spec.groups == 1 else torch.ones_like(alive)
        kept = (alive & rows).reshape(spec.groups, -1).any(0)
        kept[0] |= not kept.any()
        channels = spec.groups * int(kept.sum())
        for k in range(first, after):
            weights[k] = weights[k][kept.repeat(spec.groups)]
            is_depthwise = k > first
            stages[k] = replace(
                stages[k],
                out_channels=channels,
                **({"in_channels": channels, "groups": channels} if is_depthwise else {}),  # type: ignore[arg-type]
            )
        weights[after] = weights[after][:, kept]
        stages[after] = replace(stages[after], in_channels=channels)
    rank = _rank_of(structure, [stages[k].out_channels // spec.groups for k in firsts])
    feasible = structure.factorization.clip(spec, rank)
    if feasible == rank:
        return structure.with_rank(rank), weights
    layer = ConvLayer(replace(spec, bias=False), compose_weights(stages, weights))  # exact at a feasible rank
    chain = structure.factorization.decompose(layer, feasible)
    new = structure.with_rank(feasible)
    return new, new.stage_weights([stage.weight for stage in chain.layers])


def _rank_of(structure: Structure, sizes: Sequence[int]) -> Rank:
    """Return the rank of a layer for the sizes of its rank indices in the order of the stages."""
    if not isinstance(structure.factorization, Tucker):
        return tuple(sizes)
    remaining, (out, into) = list(sizes), structure.rank
    has_in = structure.stages[0].kernel_size != structure.spec.kernel_size
    has_out = structure.stages[-1].kernel_size != structure.spec.kernel_size
    into = remaining.pop(0) if has_in else into
    return (remaining.pop(0) if has_out else out, into)
