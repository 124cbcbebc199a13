"""The weights of a layer's stages as a factorized tensor of TensorLy, and back.

The modes of a CP or Tucker tensor are those of the kernel, (out, in, *kernel). Those of a tensor train are (in,
*kernel, out). An axis of size 1 has no stage: its factor is 1, or an identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeAlias

import tensorly
import torch
from tensorly.cp_tensor import CPTensor
from tensorly.tt_tensor import TTTensor
from tensorly.tucker_tensor import TuckerTensor
from torch import Tensor

from fxfact.conv import ConvLayer, ConvSpec, Sizes
from fxfact.errors import ArgumentError, ArgumentTypeError, RefusedError
from fxfact.factorizations import SVD, TT, CPFactorized, CPMobilenet, Factorization, Rank, Tucker
from fxfact.nn.structure import Structure

FactorizedTensor: TypeAlias = CPTensor | TuckerTensor | TTTensor


def factors_of(structure: Structure, weights: Sequence[Tensor]) -> FactorizedTensor:
    """Return the tensor whose factors are views of the stages' weights (out, in / groups, *kernel).

    Raises RefusedError if TensorLy has no form for it.
    """
    spec, method = structure.spec, structure.factorization
    if spec.groups > 1 or not isinstance(method, CPFactorized | CPMobilenet | Tucker | TT):
        what = f"{spec.groups} groups" if spec.groups > 1 else method.name
        raise RefusedError(f"TensorLy has no tensor for a layer with {what} ({spec}). Read the weights of its stages.")
    with with_tensorly():
        if isinstance(method, Tucker):
            return TuckerTensor(_tucker_factors(structure, weights))
        first, *space, last = weights
        into, out = first.flatten(1).T, last.flatten(1)
        if isinstance(method, TT):
            return TTTensor([into[None], *_train_cores(spec, space, into), out.T[..., None]])
        merged = isinstance(method, CPMobilenet) or structure.implementation == "mobilenet"
        factors = [part.flatten(1).T for part in space] if merged else _cp_factors(spec, space)
        return CPTensor((out.new_ones(structure.rank), [out, into, *factors]))


def _cp_factors(spec: ConvSpec, space: Sequence[Tensor]) -> Iterator[Tensor]:
    stages = iter(space)
    for size in spec.kernel_size:
        yield next(stages).flatten(1).T if size > 1 else space[0].new_ones(1, len(space[0]))


def _train_cores(spec: ConvSpec, space: Sequence[Tensor], before: Tensor) -> Iterator[Tensor]:
    stages = iter(space)
    for size in spec.kernel_size:
        rank = before.shape[-1]
        before = next(stages).flatten(2).permute(1, 2, 0) if size > 1 else _eye(rank, before)[:, None]
        yield before


def _tucker_factors(structure: Structure, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the core and the factors. A side without a pointwise stage has an identity."""
    kernels = [stage.kernel_size for stage in structure.stages]
    k = kernels.index(structure.spec.kernel_size)
    core = weights[k]
    out = weights[-1].flatten(1) if k < len(weights) - 1 else _eye(core.shape[0], core)
    into = weights[0].flatten(1).T if k else _eye(core.shape[1], core)
    return core, [out, into, *(_eye(size, core) for size in core.shape[2:])]


@dataclass(frozen=True, eq=False)
class ReadFactors:
    """A factorized tensor as the weights of a chain.

    Attributes:
        kernel_shape: the shape (out, in, *kernel) of the kernel.
        factorization: the factorization.
        rank: the rank, which may be larger than a chain can use.
        weights: the elements of the weights of the chain's stages in order.
        source: the factorized tensor.
    """

    kernel_shape: Sizes
    factorization: Factorization
    rank: Rank
    weights: list[Tensor]
    source: FactorizedTensor

    def fit(self, spec: ConvSpec, implementation: str) -> tuple[Structure, list[Tensor]]:
        """Return the structure of a layer for the convolution, and the weights of its stages.

        A rank that is larger than the convolution can use is lowered, which is exact: then the kernel is decomposed
        again. Raises ArgumentError or RefusedError.
        """
        method = self.factorization
        structure = Structure.of(spec, method, method.clip(spec, self.rank), implementation)
        weights = self.weights
        if structure.rank != self.rank:
            kernel = self.kernel()
            chain = method.decompose(ConvLayer(replace(spec, bias=False), kernel.double()), structure.rank)
            weights = [stage.weight.to(kernel.dtype) for stage in chain.layers]
        stages = method.layout(spec, structure.rank)
        shaped = [part.reshape(stage.weight_shape) for part, stage in zip(weights, stages, strict=True)]
        return structure, structure.stage_weights(shaped)

    def kernel(self) -> Tensor:
        """Return the dense kernel (out, in, *kernel)."""
        with torch.no_grad(), with_tensorly():
            kernel: Tensor = self.source.to_tensor()
        return (kernel.movedim(-1, 0) if isinstance(self.source, TTTensor) else kernel).reshape(self.kernel_shape)


def read_factors(factors: FactorizedTensor, kernel_size: Sizes | None = None) -> ReadFactors:
    """Read a factorized tensor of TensorLy.

    ``kernel_size`` is that of a CP tensor (out, in, positions) that has all spatial axes in one mode. Raises
    ArgumentTypeError or ArgumentError.
    """
    if not isinstance(factors, CPTensor | TuckerTensor | TTTensor) or not _holds_tensors(factors):
        raise ArgumentTypeError(
            f"factors must be a CPTensor, TuckerTensor or TTTensor of PyTorch tensors, got {type(factors).__name__}. "
            "Make one of TensorLy, tensorly.cp_tensor.CPTensor((weights, factors)), or pass layer.factors."
        )
    order = len(factors.factors) - 2
    if order < 1 or (kernel_size is not None and not (order == 1 and isinstance(factors, CPTensor))):
        raise ArgumentError(
            f"the factors of a convolution have the modes (out, in, *kernel), got {order + 2} modes and "
            f"kernel_size={kernel_size}. Pass kernel_size only with a CP tensor that has all spatial axes in one mode."
        )
    with torch.no_grad(), with_tensorly():
        read = _READERS[type(factors)](factors)
        if kernel_size is None:
            return read
        shape = (*read.kernel_shape[:2], *kernel_size)
        return replace(read, kernel_shape=shape, factorization=CPMobilenet())


def _holds_tensors(factors: FactorizedTensor) -> bool:
    return all(isinstance(factor, Tensor) for factor in factors.factors)


def _read_cp(factors: CPTensor) -> ReadFactors:
    out, into, *kernel = map(len, factors.factors)
    return ReadFactors(
        kernel_shape=(out, into, *kernel),
        factorization=CPFactorized() if max(kernel) > 1 else SVD(),
        rank=(factors.factors[0].shape[1],),
        weights=cp_chain(factors.weights, factors.factors, tuple(kernel)),
        source=factors,
    )


def _read_tucker(factors: TuckerTensor) -> ReadFactors:
    out, into, *kernel = map(len, factors.factors)
    first, core, last = tucker_chain(factors.core, factors.factors)
    is_pointwise = max(kernel) == 1
    return ReadFactors(
        kernel_shape=(out, into, *kernel),
        factorization=SVD() if is_pointwise else Tucker(keep_full_sides=True),
        rank=(core.shape[1],) if is_pointwise else (core.shape[0], core.shape[1]),
        weights=[first, last @ core.flatten(1)] if is_pointwise else [first, core, last],
        source=factors,
    )


def _read_tt(factors: TTTensor) -> ReadFactors:
    into, *kernel, out = (core.shape[1] for core in factors.factors)
    return ReadFactors(
        kernel_shape=(out, into, *kernel),
        factorization=TT() if max(kernel) > 1 else SVD(),
        rank=tt_chain_rank([core.shape for core in factors.factors]),
        weights=tt_chain(factors.factors, tuple(kernel)),
        source=factors,
    )


# torch.fx can trace these three, since the size of the kernel decides everything.


def cp_chain(gains: Tensor, factors: Sequence[Tensor], kernel_size: Sizes) -> list[Tensor]:
    """Return the weights of the chain of a CP tensor (out, in, *kernel), whose components have gains."""
    out, into, *space = factors
    out = out * gains
    for factor, size in zip(space, kernel_size, strict=True):
        out = out * factor if size == 1 else out
    return [into.T, *(factor.T for factor, size in zip(space, kernel_size, strict=True) if size > 1), out]


def tucker_chain(core: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Return the weights of the chain of a Tucker tensor (out, in, *kernel).

    The factors of the kernel, if there are any, become part of the core.
    """
    out, into, *space = factors
    for axis, factor in enumerate(space, start=2):
        core = torch.tensordot(core, factor, dims=([axis], [1])).movedim(-1, axis)
    return [into.T, core, out]


def tt_chain(train: Sequence[Tensor], kernel_size: Sizes) -> list[Tensor]:
    """Return the weights of the chain of a tensor train (in, *kernel, out)."""
    first, *middle, last = train
    cores = [first]
    for core, size in zip(middle, kernel_size, strict=True):
        if size > 1:
            cores.append(core)
        else:
            cores[-1] = cores[-1] @ core[:, 0]
    return [cores[0][0].T, *(core.permute(2, 0, 1) for core in cores[1:]), last[..., 0].T]


def tt_chain_rank(shapes: Sequence[Sequence[int]]) -> Rank:
    """Return the rank of the chain of a tensor train with cores of these shapes."""
    (_, _, rank), *middle, _ = shapes
    ranks = [rank]
    for _, size, after in middle:
        ranks = [*ranks, after] if size > 1 else [*ranks[:-1], after]
    return tuple(ranks)


_READERS = {CPTensor: _read_cp, TuckerTensor: _read_tucker, TTTensor: _read_tt}


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def with_tensorly() -> AbstractContextManager[None]:
    """Let TensorLy compute with PyTorch, in this thread only."""
    context: AbstractContextManager[None] = tensorly.backend_context("pytorch", local_threadsafe=True)
    return context
