"""CP decomposition by alternating least squares, and the extrapolated descent."""

from __future__ import annotations

import pytest
import tensorly
import torch
from tensorly.decomposition import parafac

from fxfact.factorizations.cp_als import cp, descend
from tests.support import apart


def outer(factors: list[torch.Tensor]) -> torch.Tensor:
    letters = "abcd"[: len(factors)]
    return torch.einsum(",".join(f"{x}r" for x in letters) + "->" + letters, *factors)


@pytest.mark.parametrize("shape", [(12, 10, 9), (8, 9, 3, 3), (16, 4, 5)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_cp_recovers_a_tensor_of_its_rank(shape: tuple[int, ...], rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    tensor = outer([torch.randn(n, rank, generator=generator) for n in shape])
    assert apart(tensor, outer(cp(tensor, rank, sweeps=500, tolerance=0))) < 1e-3


def test_cp_is_closer_than_parafac_after_as_many_sweeps() -> None:
    tensor = torch.randn(32, 24, 9, generator=torch.Generator().manual_seed(0))
    for rank in (5, 40, 100):
        ours = apart(tensor, outer(cp(tensor, rank, sweeps=10, tolerance=0)))
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            _, factors = parafac(tensor, rank, n_iter_max=10, init="random", random_state=0, tol=0)
        assert ours < apart(tensor, outer(factors)) + 1e-4


def test_cp_is_exact_at_its_largest_rank() -> None:
    for shape in ((5, 4, 9), (3, 2, 25), (4, 5, 3, 3), (1, 6, 9)):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        rank = tensor.numel() // max(shape)
        assert apart(tensor, outer(cp(tensor, rank, sweeps=10, tolerance=0))) < 1e-13
        assert apart(tensor, outer(cp(tensor, rank + 3, sweeps=10, tolerance=0))) < 1e-13


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (5, 5), (1, 6), (7, 1), (8, 6, 1), (1, 8, 1, 6)])
@pytest.mark.parametrize("rank", [1, 3, 5, 9])
def test_cp_of_a_matrix_is_its_truncated_svd(shape: tuple[int, ...], rank: int) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    factors = cp(tensor, rank, sweeps=200, tolerance=1e-9)
    assert [factor.shape for factor in factors] == [(size, rank) for size in shape]
    values = torch.linalg.svdvals(tensor.squeeze()[None] if tensor.squeeze().ndim < 2 else tensor.squeeze())
    best = float(values[rank:].norm() / values.norm())
    assert apart(tensor, outer(factors)) == pytest.approx(best, rel=1e-4, abs=1e-12)


def test_cp_stays_bounded_if_components_tend_to_cancel() -> None:
    """a∘a∘b + a∘b∘a + b∘a∘a has rank 3, and is a limit of rank-2 tensors whose components grow without end."""
    a, b = torch.eye(6, dtype=torch.float64)[:2]
    terms = [(a, a, b), (a, b, a), (b, a, a)]
    tensor = sum(torch.einsum("i,j,k->ijk", *term) for term in terms)
    assert isinstance(tensor, torch.Tensor)
    factors = cp(tensor, 2, sweeps=2000, tolerance=0, generator=torch.Generator().manual_seed(0))
    assert all(factor.isfinite().all() for factor in factors)
    assert max(float(factor.norm()) for factor in factors) < 30
    assert apart(tensor, outer(factors)) < 0.1


@pytest.mark.parametrize("tensor", [torch.zeros(4, 5, 6), torch.ones(4, 5, 6), torch.full((3, 3, 3), 1e-30)])
def test_cp_is_never_nan(tensor: torch.Tensor) -> None:
    for rank in (1, 4, 12):
        factors = cp(tensor, rank, sweeps=20, tolerance=0)
        assert all(factor.isfinite().all() for factor in factors)
        assert (outer(factors) - tensor).norm() <= 1e-3 * tensor.norm()


def test_cp_from_a_random_start_depends_only_on_its_generator() -> None:
    tensor = torch.randn(8, 7, 9, generator=torch.Generator().manual_seed(0))

    def draw(seed: int) -> torch.Tensor:
        return outer(cp(tensor, 5, sweeps=3, tolerance=0, generator=torch.Generator().manual_seed(seed)))

    assert draw(1).equal(draw(1))
    assert not draw(1).equal(draw(2))


def test_descend_undoes_a_sweep_that_is_worse_and_stops_at_the_tolerance() -> None:
    starts: list[float] = []

    def halve(state: float) -> tuple[float, float]:
        starts.append(state)
        return state / 2, abs(state / 2)

    def extrapolate(now: float, before: float, step: float) -> float:
        return now + step * (now - before)

    found = descend(halve, extrapolate, 1.0, sweeps=50, tolerance=1e-6, step=4.0, longest=4.0)
    assert abs(found) < 1e-4
    assert starts[1] < 0  # 0.5 + 4 · (0.5 − 1) overshoots
    assert 0.5 in starts  # and the descent continues from the best state
    assert len(starts) < 50
    assert descend(halve, extrapolate, 1.0, sweeps=0, tolerance=0, step=1.0, longest=1.0) == 1.0
