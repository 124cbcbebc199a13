"""The contract of a rank strategy: all convolutions in, for each a factorization and a rank, or why none, out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from fxfact.conv import ConvSpec, Sizes
from fxfact.factorizations import Factorization, Rank
from fxfact.skip import Skip


@dataclass(frozen=True)
class Candidate:
    """A convolution to choose for; ``input_sizes`` has its spatial size at every call, None where unknown."""

    path: str
    spec: ConvSpec
    input_sizes: tuple[Sizes, ...] | None


@dataclass(frozen=True)
class Choice:
    """What a convolution becomes; ``note`` says what of the request could not be met."""

    factorization: Factorization
    rank: Rank
    note: str = ""


class RankStrategy(ABC):
    """Chooses for all convolutions of a network together."""

    @abstractmethod
    def choose(self, candidates: Sequence[Candidate]) -> tuple[Choice | Skip, ...]:
        """One answer for each candidate, in order."""
