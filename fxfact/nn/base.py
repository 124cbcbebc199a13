"""How a factorized layer is put together: a value, before there are any tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from fxfact.conv import ConvSpec, compose_weights, composed_spec
from fxfact.errors import ArgumentError, RefusedError
from fxfact.factorizations import (
    CPFactorized,
    Factorization,
    Rank,
    RankRequest,
    Tucker,
    parse_factorization,
    parse_rank_request,
    resolve_rank,
)
from fxfact.skip import Skip

Implementation = Literal["factorized", "mobilenet", "reconstructed"]


@dataclass(frozen=True)
class Structure:
    """The dense convolution ``spec``, its factorization and rank, how it is computed, and the convolutions ``stages``
    that hold its parameters (computed once: a forward must not).
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
        rank: RankRequest,
        implementation: str,
    ) -> Structure:
        """Understand names and ranks. 'cp' is CP over all modes, 'tucker' keeps both pointwise stages at any rank, and
        a fraction of the parameters becomes a rank by TensorLy's rules. Raises ArgumentError, RankError, RefusedError.
        """
        in_layers = {"cp": CPFactorized(), "tucker": Tucker(keep_full_sides=True)}
        method = in_layers.get(factorization.lower()) if isinstance(factorization, str) else None
        method = method or parse_factorization(factorization)
        offered = [n for n in get_args(Implementation) if n != "mobilenet" or isinstance(method, CPFactorized)]
        if implementation not in offered:
            raise ArgumentError(f"implementation of {method.name} is one of {offered}, got {implementation!r}")
        found = resolve_rank(method, spec, parse_rank_request(rank), clip=False, rule="tensorly")
        if isinstance(found, Skip):
            raise RefusedError(f"{found.reason} ({spec})")
        stages = method.layout(spec, found)
        if implementation == "mobilenet":
            stages = (stages[0], composed_spec(stages[1:-1]), stages[-1])
        return cls(spec, method, found, implementation, stages)  # type: ignore[arg-type]

    def merged(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The decomposed weights as ``stages`` wants them: for 'mobilenet' the 1-D kernels become one."""
        if self.implementation != "mobilenet":
            return list(weights)
        space = self.factorization.layout(self.spec, self.rank)[1:-1]
        return [weights[0], compose_weights(space, weights[1:-1]), weights[-1]]
