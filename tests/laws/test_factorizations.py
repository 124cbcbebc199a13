"""Every factorization satisfies the laws. A new one gets a class here that says how it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxfact.conv import ConvSpec
from fxfact.factorizations import (
    FACTORIZATIONS,
    SVD,
    TT,
    ChannelSVD,
    CPFactorized,
    CPMobilenet,
    Factorization,
    SpatialSVD,
    Tucker,
    pointwise,
    truncated_svd,
)
from tests.laws.factorization_laws import FactorizationLaws
from tests.support import SPECS

MATRICES = frozenset(name for name in SPECS if "pointwise" in name or "linear" in name)
DEPTHWISE = frozenset({"depthwise", "transposed depthwise"})
ONE_AXIS = frozenset({"1-D", "1-D circular", "one axis", "transposed 1-D"})


class TestCPMobilenet(FactorizationLaws):
    rejected = MATRICES | DEPTHWISE
    estimates = "upper"

    def make(self) -> Factorization:
        return CPMobilenet()

    def make_quick(self) -> Factorization:
        return CPMobilenet(sweeps=1)


class TestCPFactorized(FactorizationLaws):
    rejected = MATRICES | DEPTHWISE
    estimates = "upper"

    def make(self) -> Factorization:
        return CPFactorized()

    def make_quick(self) -> Factorization:
        return CPFactorized(sweeps=1)


class TestTucker(FactorizationLaws):
    rejected = MATRICES | DEPTHWISE
    estimates = "upper"
    stages_at_full_rank = 1

    def make(self) -> Factorization:
        return Tucker()


class TestTuckerWithFullSides(FactorizationLaws):
    rejected = MATRICES | DEPTHWISE
    estimates = "upper"

    def make(self) -> Factorization:
        return Tucker(keep_full_sides=True)


class TestTT(FactorizationLaws):
    rejected = MATRICES | DEPTHWISE
    estimates = "upper"

    def make(self) -> Factorization:
        return TT()


class TestSpatialSVD(FactorizationLaws):
    rejected = MATRICES | ONE_AXIS
    estimates = "exact"

    def make(self) -> Factorization:
        return SpatialSVD()


class TestSpatialSVDWithLastAxesFirst(FactorizationLaws):
    rejected = MATRICES | ONE_AXIS
    estimates = "exact"

    def make(self) -> Factorization:
        return SpatialSVD(last_axes_first=True)


class TestChannelSVD(FactorizationLaws):
    rejected = MATRICES | DEPTHWISE | {"one output channel"}
    estimates = "exact"

    def make(self) -> Factorization:
        return ChannelSVD()


class TestSVD(FactorizationLaws):
    rejected = frozenset(SPECS) - MATRICES
    kernel_size = (1, 1)
    estimates = "exact"

    def make(self) -> Factorization:
        return SVD()


@dataclass(frozen=True, kw_only=True)
class InputSVD(Factorization):
    """A factorization as somebody else would write it: 1×1 → 1×1. It needs these four methods and no registration."""

    name = "input_svd"

    def _rejects(self, block: ConvSpec) -> str | None:
        if set(block.kernel_size) == {1} and block.in_channels > 1:
            return None
        return "the kernel is not 1×1, or has a single input channel"

    def _max_rank(self, block: ConvSpec) -> tuple[int, ...]:
        return (min(block.in_channels, block.out_channels),)

    def _stages(self, block: ConvSpec, rank: tuple[int, ...]) -> tuple[ConvSpec, ...]:
        return (pointwise(block, block.in_channels, *rank), replace(block, in_channels=rank[0]))

    def _weights(
        self, block: ConvSpec, weight: Tensor, rank: tuple[int, ...], generator: torch.Generator | None
    ) -> Sequence[Tensor]:
        left, right = truncated_svd(weight.flatten(1), *rank)
        return (right, left)


class TestFactorizationOfOnesOwn(FactorizationLaws):
    """A factorization that is not part of the package inherits everything, once it is clear how it is made."""

    rejected = frozenset(name for name in SPECS if "pointwise" not in name)
    kernel_size = (1, 1)

    def make(self) -> Factorization:
        return InputSVD()


def test_every_factorization_of_the_package_has_laws() -> None:
    tested = {type(laws().make()) for laws in FactorizationLaws.__subclasses__()}
    assert tested == {*FACTORIZATIONS, InputSVD}
