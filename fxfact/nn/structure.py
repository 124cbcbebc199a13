"""A factorized layer without its tensors, and its arguments as TensorLy-Torch writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from tensorly.tucker_tensor import validate_tucker_rank
from torch import Tensor

from fxfact.conv import ConvSpec, Skip, compose_weights, composed_spec
from fxfact.errors import ArgumentError, RankError, RefusedError
from fxfact.factorizations import (
    TT,
    CPFactorized,
    Factorization,
    ParsedRank,
    Rank,
    RankSpec,
    Tucker,
    parse_factorization,
    parse_rank_spec,
    resolve_rank,
)

Implementation = Literal["factorized", "mobilenet", "reconstructed"]
FixedRankModes = str | Sequence[int] | None
_OPTION_NAMES = {"n_iter_max": "sweeps", "tol": "tolerance"}  # TensorLy's name: ours


@dataclass(frozen=True)
class Structure:
    """A factorized layer without its tensors.

    Attributes:
        spec: the dense convolution.
        factorization: how the kernel is factorized.
        rank: the rank of each group.
        implementation: how ``forward`` computes the layer.
        stages: the convolutions that hold the parameters. They are stored because ``forward`` must not compute them.
    """

    spec: ConvSpec
    factorization: Factorization
    rank: Rank
    implementation: Implementation
    stages: tuple[ConvSpec, ...]

    @classmethod
    def parse(
        cls,
        spec: ConvSpec,
        factorization: str | Factorization,
        rank: RankSpec,
        implementation: str,
        fixed_rank_modes: FixedRankModes = None,
    ) -> Structure:
        """Parse the arguments of a layer. Raises ArgumentError, RankError or RefusedError."""
        method = _parse_method(factorization)
        request = _from_tensorly(method, spec, parse_rank_spec(rank))
        fixed = _fixed_channel_modes(method, spec, fixed_rank_modes)
        if fixed and isinstance(request, float):
            request = _tucker_rank_with_fixed_modes(spec, request, fixed)
        resolved = resolve_rank(method, spec, request, clip=False, rule="tensorly")
        if isinstance(resolved, Skip):
            raise RefusedError(f"{resolved.reason} ({spec})")
        if fixed:
            most = method.max_rank(spec)
            resolved = tuple(most[mode] if mode in fixed else r for mode, r in enumerate(resolved))
        return cls.of(spec, method, resolved, implementation)

    @classmethod
    def of(cls, spec: ConvSpec, method: Factorization, rank: Rank, implementation: str) -> Structure:
        """Return the structure for a rank. Raises ArgumentError, RankError or RefusedError."""
        allowed = [n for n in get_args(Implementation) if n != "mobilenet" or isinstance(method, CPFactorized)]
        if implementation not in allowed:
            raise ArgumentError(f"implementation of {method.name} is one of {allowed}, got {implementation!r}")
        stages = method.layout(spec, rank)
        if implementation == "mobilenet":
            stages = (stages[0], composed_spec(stages[1:-1]), stages[-1])
        return cls(spec, method, rank, implementation, stages)  # type: ignore[arg-type]

    def stage_weights(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the weights of ``stages`` for those of the chain: 'mobilenet' composes the 1-D kernels into one."""
        if self.implementation != "mobilenet":
            return list(weights)
        space = self.factorization.layout(self.spec, self.rank)[1:-1]
        return [weights[0], compose_weights(space, weights[1:-1]), weights[-1]]

    def with_rank(self, rank: Rank) -> Structure:
        """Return the structure with another rank. Raises RankError."""
        return Structure.of(self.spec, self.factorization, rank, self.implementation)

    def with_bias(self, bias: bool) -> Structure:
        """Return the structure with or without a bias."""
        stages = (*self.stages[:-1], replace(self.stages[-1], bias=bias))
        return replace(self, spec=replace(self.spec, bias=bias), stages=stages)


def with_options(
    factorization: str | Factorization, options: Mapping[str, Any] | None, generator: torch.Generator | None
) -> tuple[Factorization, torch.Generator | None]:
    """Return a factorization with the options of a decomposition, in TensorLy's names or ours, and the generator.

    ``random_state``, an int, seeds a generator. Raises ArgumentError for options that the factorization does not have.
    """
    method = _parse_method(factorization)
    if not options:
        return method, generator
    own = {_OPTION_NAMES.get(name, name): value for name, value in options.items()}
    if (seed := own.pop("random_state", None)) is not None:
        generator = torch.Generator().manual_seed(seed)
    known = [field.name for field in fields(method)]
    if unknown := [name for name in own if name not in known]:
        raise ArgumentError(
            f"decomposition_kwargs: {method.name} has no option {unknown[0]!r}. Its options are {known}; TensorLy's "
            f"{[*_OPTION_NAMES, 'random_state']} are known as well. Leave the others out."
        )
    return replace(method, **own), generator


def _parse_method(factorization: str | Factorization) -> Factorization:
    of_layers = {"cp": CPFactorized(), "tucker": Tucker(keep_full_sides=True)}
    method = of_layers.get(factorization.lower()) if isinstance(factorization, str) else None
    return method or parse_factorization(factorization)


def _from_tensorly(method: Factorization, spec: ConvSpec, rank: ParsedRank) -> ParsedRank:
    """Return a rank that TensorLy writes with one entry for each mode (Tucker), or 1 at both ends (TT), as ours."""
    if not isinstance(rank, tuple):
        return rank
    kernel = spec.kernel_size
    if isinstance(method, Tucker) and len(rank) == spec.order + 2:
        if rank[2:] != kernel:
            raise RankError(
                f"the spatial modes of a kernel are kept whole: the rank {rank} on {spec} must end with {kernel}. "
                f"Pass {rank[:2]}."
            )
        return rank[:2]
    if isinstance(method, TT) and len(rank) == spec.order + 3:
        inner, axes = rank[1:-1], [axis for axis, size in enumerate(kernel) if size > 1]
        translated = (inner[0], *(inner[axis + 1] for axis in axes))
        idle = (axis for axis, size in enumerate(kernel) if size == 1)
        if (rank[0], rank[-1]) != (1, 1) or any(inner[axis] != inner[axis + 1] for axis in idle):
            raise RankError(
                f"a tensor train begins and ends with rank 1, and keeps its rank along an axis of size 1, got {rank} "
                f"on {spec}. Pass {translated}, the ranks between the stages."
            )
        return translated
    return rank


def _fixed_channel_modes(method: Factorization, spec: ConvSpec, modes: FixedRankModes) -> list[int]:
    """Return the channel modes, 0 (out) and 1 (in), whose rank is their size. The spatial modes always are whole."""
    if modes is None:
        return []
    if not isinstance(method, Tucker):
        raise ArgumentError(f"fixed_rank_modes is an option of 'tucker', and {method.name} has none. Leave it out.")
    allowed = range(spec.order + 2)
    if modes == "spatial":
        return []
    if isinstance(modes, str) or any(mode not in allowed for mode in modes):
        raise ArgumentError(f"fixed_rank_modes must be 'spatial' or modes among {list(allowed)}, got {modes!r}")
    return [mode for mode in modes if mode < 2]


def _tucker_rank_with_fixed_modes(spec: ConvSpec, fraction: float, fixed: Sequence[int]) -> Rank:
    """Return TensorLy's Tucker rank for a fraction, with channel modes that keep their size."""
    shape = spec.block.weight_shape
    if len(set(fixed)) == 2:
        return shape[:2]
    rank = validate_tucker_rank(shape, fraction, fixed_modes=[*fixed, *range(2, len(shape))])
    return tuple(min(int(r), n) for r, n in zip(rank[:2], shape, strict=False))
