from __future__ import annotations

import pytest
import tensorly
import torch
from tensorly.decomposition import parafac
from tensorly.decomposition import partial_tucker as tensorly_tucker

from fxfact.factorizations.cp_als import cp
from fxfact.factorizations.linalg import truncated_svd
from fxfact.factorizations.tt import tt
from fxfact.factorizations.tucker import partial_tucker
from tests.support import apart


def low_rank(rows: int, columns: int, singular: list[float], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(n, len(singular), generator=generator, dtype=torch.float64) for n in (rows, columns)]
    left, right = (torch.linalg.qr(matrix).Q for matrix in draw)
    return (left * torch.tensor(singular, dtype=torch.float64) @ right.T).to(dtype)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9), (1, 5), (5, 1)])
def test_svd_is_the_best_approximation(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    singular = torch.linalg.svdvals(matrix)
    for rank in range(1, min(shape) + 1):
        left, right = truncated_svd(matrix, rank)
        missed = (matrix - left @ right).norm()
        assert float(missed - singular[rank:].norm()) < 1e-12
        assert torch.allclose(left.norm(dim=0), right.norm(dim=1))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_svd_at_full_rank_reaches_the_dtype(dtype: torch.dtype, allowed: float) -> None:
    matrix = low_rank(40, 60, [10.0 ** (-k / 3) for k in range(40)], dtype)
    left, right = truncated_svd(matrix, 40)
    assert apart(matrix, left @ right) < allowed


def test_svd_finds_directions_that_a_gram_matrix_in_double_cannot_see() -> None:
    matrix = low_rank(30, 50, [1.0, 1e-5, 1e-9, 1e-10], torch.float64)
    left, right = truncated_svd(matrix, 3)
    assert apart(matrix, left @ right) < 2e-10


def test_svd_of_nothing_is_nothing() -> None:
    left, right = truncated_svd(torch.zeros(4, 6), 2)
    assert not (left @ right).any()
    assert left.isfinite().all()
    assert right.isfinite().all()


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("shape", [(12, 8, 3, 3), (30, 2, 3), (2, 30, 5), (1, 7, 3, 3)])
def test_tucker_at_full_rank_is_exact(shape: tuple[int, ...], dtype: torch.dtype, allowed: float) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    first, second, core = partial_tucker(tensor, (shape[0], shape[1]), sweeps=10, tolerance=0)
    assert apart(tensor, torch.einsum("op,iq,pq...->oi...", first, second, core)) < allowed


def test_tucker_is_as_near_as_tensorly() -> None:
    tensor = torch.randn(24, 20, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for ranks in ((4, 6), (12, 10), (23, 3)):
        first, second, core = partial_tucker(tensor, ranks, sweeps=10, tolerance=1e-4)
        ours = apart(tensor, torch.einsum("op,iq,pqxy->oixy", first, second, core))
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            (their_core, (a, b)), _ = tensorly_tucker(tensor, ranks, modes=[0, 1])
        theirs = apart(tensor, torch.einsum("op,iq,pqxy->oixy", a, b, their_core))
        assert ours < theirs + 1e-4
        assert apart(torch.eye(ranks[0], dtype=torch.float64), first.T @ first) < 1e-12


def outer(factors: list[torch.Tensor]) -> torch.Tensor:
    letters = "abcd"[: len(factors)]
    return torch.einsum(",".join(f"{x}r" for x in letters) + "->" + letters, *factors)


@pytest.mark.parametrize("shape", [(12, 10, 9), (8, 9, 3, 3), (16, 4, 5)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_cp_recovers_an_exactly_low_rank_tensor(shape: tuple[int, ...], rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    tensor = outer([torch.randn(n, rank, generator=generator) for n in shape])
    assert apart(tensor, outer(cp(tensor, rank, sweeps=500, tolerance=0))) < 1e-3


def test_cp_is_nearer_than_parafac_after_as_many_sweeps() -> None:
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


def test_cp_stays_bounded_where_components_want_to_cancel() -> None:
    """a∘a∘b + a∘b∘a + b∘a∘a is of rank 3, and a limit of rank-2 tensors whose components grow without end."""
    a, b = torch.eye(6, dtype=torch.float64)[:2]
    terms = [(a, a, b), (a, b, a), (b, a, a)]
    tensor = sum(torch.einsum("i,j,k->ijk", *term) for term in terms)
    assert isinstance(tensor, torch.Tensor)
    factors = cp(tensor, 2, sweeps=2000, tolerance=0, random=torch.Generator().manual_seed(0))
    assert all(factor.isfinite().all() for factor in factors)
    assert max(float(factor.norm()) for factor in factors) < 30
    assert apart(tensor, outer(factors)) < 0.1


@pytest.mark.parametrize("tensor", [torch.zeros(4, 5, 6), torch.ones(4, 5, 6), torch.full((3, 3, 3), 1e-30)])
def test_cp_never_gives_nan(tensor: torch.Tensor) -> None:
    for rank in (1, 4, 12):
        factors = cp(tensor, rank, sweeps=20, tolerance=0)
        assert all(factor.isfinite().all() for factor in factors)
        assert (outer(factors) - tensor).norm() <= 1e-3 * tensor.norm()


def test_cp_at_random_depends_on_its_generator_alone() -> None:
    tensor = torch.randn(8, 7, 9, generator=torch.Generator().manual_seed(0))

    def draw(seed: int) -> torch.Tensor:
        return outer(cp(tensor, 5, sweeps=3, tolerance=0, random=torch.Generator().manual_seed(seed)))

    assert draw(1).equal(draw(1))
    assert not draw(1).equal(draw(2))


def test_tt_is_exact_at_full_ranks() -> None:
    tensor = torch.randn(4, 3, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, c, d = tt(tensor, (4, 12, 5))
    assert apart(tensor, torch.einsum("xip,pjq,qkr,rly->ijkl", a, b, c, d)) < 1e-13
