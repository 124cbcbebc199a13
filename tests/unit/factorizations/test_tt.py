"""Tensor trains."""

from __future__ import annotations

import pytest
import torch

from fxfact.conv import ConvSpec
from fxfact.errors import RankError
from fxfact.factorizations.tt import TT, tt
from tests.support import apart


def test_tt_is_exact_at_full_ranks() -> None:
    tensor = torch.randn(4, 3, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, c, d = tt(tensor, (4, 12, 5))
    assert apart(tensor, torch.einsum("xip,pjq,qkr,rly->ijkl", a, b, c, d)) < 1e-13


def test_tt_ranks_that_bound_each_other_are_refused_or_lowered() -> None:
    spec = ConvSpec.parse(6, 8, (3, 3))
    with pytest.raises(RankError, match="bound each other"):
        TT().layout(spec, (1, 9, 8))
    assert TT().clip(spec, (1, 9, 8)) == (1, 3, 8)
    assert TT().clip(spec, (100, 100, 1)) == (6, 3, 1)


def test_tt_has_a_full_stage_for_each_axis() -> None:
    stages = TT().layout(ConvSpec.parse(6, 8, (3, 5), stride=2, padding=(1, 2)), (4, 6, 5))
    assert [(s.in_channels, s.out_channels, s.kernel_size, s.groups) for s in stages] == [
        (6, 4, (1, 1), 1),
        (4, 6, (3, 1), 1),
        (6, 5, (1, 5), 1),
        (5, 8, (1, 1), 1),
    ]
