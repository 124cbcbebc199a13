"""Tucker-2 and the decomposition that it uses."""

from __future__ import annotations

import pytest
import tensorly
import torch
from tensorly.decomposition import partial_tucker as tensorly_tucker

from fxfact.conv import ConvSpec, compose
from fxfact.errors import ArgumentError
from fxfact.factorizations.tucker import Tucker, partial_tucker
from tests.support import apart, random_layer


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("shape", [(12, 8, 3, 3), (30, 2, 3), (2, 30, 5), (1, 7, 3, 3)])
def test_partial_tucker_is_exact_at_full_rank(shape: tuple[int, ...], dtype: torch.dtype, allowed: float) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    first, second, core = partial_tucker(tensor, (shape[0], shape[1]), sweeps=10, tolerance=0)
    assert apart(tensor, torch.einsum("op,iq,pq...->oi...", first, second, core)) < allowed


def test_partial_tucker_is_as_close_as_tensorly() -> None:
    tensor = torch.randn(24, 20, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for ranks in ((4, 6), (12, 10), (23, 3)):
        first, second, core = partial_tucker(tensor, ranks, sweeps=10, tolerance=1e-4)
        ours = apart(tensor, torch.einsum("op,iq,pqxy->oixy", first, second, core))
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            (their_core, (a, b)), _ = tensorly_tucker(tensor, ranks, modes=[0, 1])
        theirs = apart(tensor, torch.einsum("op,iq,pqxy->oixy", a, b, their_core))
        assert ours < theirs + 1e-4
        assert apart(torch.eye(ranks[0], dtype=torch.float64), first.T @ first) < 1e-12


def test_tucker_has_no_pointwise_stage_on_a_side_at_full_rank() -> None:
    spec = ConvSpec.parse(6, 8, (3, 3))
    assert [str(s) for s in Tucker().layout(spec, (8, 3))] == ["Conv2d(6→3, 1×1)", "Conv2d(3→8, 3×3)"]
    assert [str(s) for s in Tucker().layout(spec, (4, 6))] == ["Conv2d(6→4, 3×3)", "Conv2d(4→8, 1×1)"]
    assert len(Tucker().layout(spec, (8, 6))) == 1
    assert len(Tucker(keep_full_sides=True).layout(spec, (8, 6))) == 3
    layer = random_layer(spec)
    for rank in ((8, 3), (4, 6), (8, 6)):
        kept, dropped = (
            apart(layer.weight, compose(tucker.decompose(layer, rank)))
            for tucker in (Tucker(keep_full_sides=True), Tucker())
        )
        assert abs(kept - dropped) < 1e-12


@pytest.mark.parametrize("options", [{"sweeps": -1}, {"sweeps": "9"}, {"tolerance": -1.0}, {"tolerance": "small"}])
def test_tucker_checks_its_options(options: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        Tucker(**options)  # type: ignore[arg-type]
