"""The tensor that several convolutions share: its rank, its decomposition, and the stages of each convolution."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from tensorly.cp_tensor import validate_cp_rank
from tensorly.tt_tensor import validate_tt_rank
from tensorly.tucker_tensor import validate_tucker_rank
from torch import Tensor

from fxfact.conv import ConvLayer, ConvSpec, Sizes
from fxfact.errors import ArgumentError, RankError
from fxfact.factorizations import (
    SVD,
    TT,
    CPFactorized,
    Factorization,
    Rank,
    RankSpec,
    Tucker,
    parse_rank_spec,
    truncated_svd,
)
from fxfact.nn.factors import cp_chain, factors_of, tt_chain, tt_chain_rank, tucker_chain
from fxfact.nn.structure import Structure
from fxfact.utils import check_memory

JointTensors = tuple[Tensor | None, list[Tensor]]
"""The core of a Tucker tensor, the gains of a CP tensor, or None; and the factors in the order of the modes."""

_METHODS: dict[str, Factorization] = {"cp": CPFactorized(), "tucker": Tucker(keep_full_sides=True), "tt": TT()}


def joint_chain(
    factorization: str, spec: ConvSpec, tensors: JointTensors, place: Sizes, rank: Rank
) -> tuple[tuple[ConvSpec, ...], list[Tensor]]:
    """Return the specs and the weights (out, in / groups, *kernel) of the stages of the convolution at a place.

    ``rank`` is that of its chain. torch.fx can trace it.
    """
    weights = _chain_weights(factorization, spec.kernel_size, tensors, place)
    method = SVD() if len(weights) == 2 else _METHODS[factorization]  # CP and TT of a 1×1 kernel
    stages = method.unbounded_layout(spec, rank)
    return stages, [weight.reshape(stage.weight_shape) for weight, stage in zip(weights, stages, strict=True)]


def _chain_weights(factorization: str, kernel_size: Sizes, tensors: JointTensors, place: Sizes) -> list[Tensor]:
    core, factors = tensors
    mixing, rest = factors[: len(place)], factors[len(place) :]
    if factorization == "tt":
        row = mixing[0][:, place[0]]
        for train_core, i in zip(mixing[1:], place[1:], strict=True):
            row = row @ train_core[:, i]
        return tt_chain([torch.tensordot(row, rest[0], dims=1), *rest[1:]], kernel_size)
    own = cast(Tensor, core)
    for factor, i in zip(mixing, place, strict=True):
        own = own * factor[i] if factorization == "cp" else torch.tensordot(factor[i], own, dims=1)
    return cp_chain(own, rest, kernel_size) if factorization == "cp" else tucker_chain(own, rest)


def chain_rank(factorization: str, tensors: JointTensors, axes: int) -> Rank:
    """Return the rank of the chain of each convolution, where the first modes are ``axes`` numbers of layers."""
    core, factors = tensors
    if factorization == "tt":
        return tt_chain_rank([factor.shape for factor in factors[axes:]])
    return tuple(factors[0].shape[1:]) if factorization == "cp" else tuple(cast(Tensor, core).shape[axes : axes + 2])


def joint_rank(factorization: str, layers: Sizes, spec: ConvSpec, rank: RankSpec) -> Rank:
    """Return the rank of a joint tensor: (R,) for CP, (*layers, out, in) for Tucker, the inner ranks for TT.

    Raises ArgumentError or RankError.
    """
    name = factorization.lower() if isinstance(factorization, str) else ""
    if name not in _METHODS:
        raise ArgumentError(f"the factorization of a joint layer is one of {list(_METHODS)}, got {factorization!r}")
    request = parse_rank_spec(rank)
    channels, kernel = spec.weight_shape[:2], spec.kernel_size
    if name == "cp":
        found = request[0] if isinstance(request, tuple) and len(request) == 1 else request
        if isinstance(found, tuple):
            raise RankError(f"the rank of a CP tensor is one int, got {found}. Pass one.")
        return (max(1, int(validate_cp_rank((*layers, *channels, *kernel), found))),)
    if name == "tucker":
        shape = (*layers, *channels)
        if isinstance(request, float):
            fixed = list(range(len(shape), len(shape) + len(kernel)))
            request = tuple(int(r) for r in validate_tucker_rank((*shape, *kernel), request, fixed_modes=fixed))
        elif isinstance(request, int):
            request = (request,) * len(shape)
        if request[len(shape) :] not in ((), kernel) or len(request) < len(shape):
            raise RankError(
                f"a Tucker rank of {layers} layers has {len(shape)} entries, got {request}. Pass that many ints."
            )
        return tuple(min(r, n) for r, n in zip(request, shape, strict=False))
    train = (*layers, channels[1], *kernel, channels[0])
    if isinstance(request, tuple) and len(request) not in (len(train) - 1, len(train) + 1):
        raise RankError(
            f"a tensor train of {layers} layers has {len(train) - 1} ranks, got {request}. Pass that many ints."
        )
    inner = request if isinstance(request, tuple) else tuple(int(r) for r in validate_tt_rank(train, request)[1:-1])
    inner = inner if len(inner) == len(train) - 1 else inner[1:-1]
    most = (min(math.prod(train[:k]), math.prod(train[k:])) for k in range(1, len(train)))
    return tuple(min(r, n) for r, n in zip(inner, most, strict=True))


def empty_tensors(factorization: str, layers: Sizes, spec: ConvSpec, rank: Rank, like: Tensor) -> JointTensors:
    """Return an uninitialized core and factors: those of the modes (*layers, out, in, *kernel), or of the train.

    Raises ArgumentError if the core is larger than the memory of the device.
    """
    channels, kernel = spec.weight_shape[:2], spec.kernel_size
    if factorization.lower() == "cp":
        return like.new_empty(rank), [like.new_empty(n, *rank) for n in (*layers, *channels, *kernel)]
    if factorization.lower() == "tucker":
        check_memory(f"the core of {math.prod(layers)} joint layers {spec}", math.prod((*rank, *kernel)), like)
        factors = [like.new_empty(n, r) for n, r in zip((*layers, *channels), rank, strict=True)]
        return like.new_empty(*rank, *kernel), factors
    train = (*layers, channels[1], *kernel, channels[0])
    return None, [like.new_empty(*core) for core in zip((1, *rank), train, (*rank, 1), strict=True)]


def decompose_jointly(factorization: str, layers: Sizes, spec: ConvSpec, rank: Rank, kernels: Tensor) -> JointTensors:
    """Return the core and the factors for dense kernels (layers, out, in, *kernel).

    They are one kernel of a convolution of higher order, in which the layers are one more axis.
    """
    (count,), kernel = layers, spec.kernel_size
    if factorization.lower() == "tt":
        wide = ConvSpec.parse(count, spec.out_channels, (spec.in_channels, *kernel))
        stages = (rank[0], *(rank[axis + 1] for axis, size in enumerate(wide.kernel_size) if size > 1))
        factors = _factors(TT(), wide, kernels.transpose(0, 1), stages)
        return None, list(factors.factors)
    wide = ConvSpec.parse(spec.in_channels, spec.out_channels, (count, *kernel))
    if factorization.lower() == "cp":
        factors = _factors(CPFactorized(), wide, kernels.movedim(0, 2), rank)
        out, into, mixing, *space = factors.factors
        return factors.weights, [mixing, out, into, *space]
    factors = _factors(Tucker(keep_full_sides=True), wide, kernels.movedim(0, 2), rank[1:])
    core = factors.core.movedim(2, 0)
    mixing, reduced = truncated_svd(core.flatten(1), rank[0])
    return reduced.reshape(rank[0], *core.shape[1:]), [mixing, *factors.factors[:2]]


def _factors(method: Factorization, spec: ConvSpec, kernel: Tensor, rank: Rank) -> Any:
    """Return the factors of a kernel at a rank. One that is larger than it can use is lowered, which is exact."""
    rank = method.clip(spec, rank)
    chain = method.decompose(ConvLayer(spec, kernel.contiguous()), rank)
    return factors_of(Structure.of(spec, method, rank, "factorized"), [layer.weight for layer in chain.layers])
