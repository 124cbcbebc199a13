"""What a convolution, or a network, costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxfact.conv import ConvSpec, Sizes, chain_macs


@dataclass(frozen=True)
class Cost:
    """``params``: numbers stored. ``macs``: multiply-accumulates for one sample, None where sizes are unknown."""

    params: int
    macs: int | None

    def __add__(self, other: Cost) -> Cost:
        unknown = self.macs is None or other.macs is None
        return Cost(self.params + other.params, None if unknown else (self.macs or 0) + (other.macs or 0))

    def __sub__(self, other: Cost) -> Cost:
        unknown = self.macs is None or other.macs is None
        return Cost(self.params - other.params, None if unknown else (self.macs or 0) - (other.macs or 0))

    def exceeds(self, other: Cost) -> bool:
        """Whether this costs more, in parameters or (where both are known) in MACs."""
        more_macs = self.macs is not None and other.macs is not None and self.macs > other.macs
        return self.params > other.params or more_macs


def cost_of(stages: Sequence[ConvSpec], input_sizes: Sequence[Sizes] | None) -> Cost:
    """Of stages run one after the other, once for every size in ``input_sizes`` (None: sizes unknown)."""
    params = sum(spec.params for spec in stages)
    return Cost(params, None if input_sizes is None else sum(chain_macs(stages, size) for size in input_sizes))
