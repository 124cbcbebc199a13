"""The Fisher information of a convolution: moments and the increase of the loss."""

from __future__ import annotations

import pytest
import torch

from fxfact.conv import ConvSpec, KroneckerMoment, as_matrix, sqrt_and_inverse
from fxfact.errors import SpecError
from tests.support import SPECS, equal_fishers, random_fisher, random_layer, random_moment


@pytest.mark.parametrize("name", ["plain", "groups", "depthwise, multiplied", "transposed, grouped, dilated", "1-D"])
def test_the_loss_increase_is_the_quadratic_form_summed_over_groups(name: str) -> None:
    spec = SPECS[name]
    fisher, difference = random_fisher(spec), random_layer(spec).weight
    expected = 0.0
    for k, part in enumerate(difference.chunk(spec.groups)):
        matrix = as_matrix(spec, part)
        inputs, outputs = fisher.input.factors[0][k], fisher.output.factors[0][k]
        rows, columns = (inputs, outputs) if spec.transposed else (outputs, inputs)
        expected += float((rows @ matrix @ columns @ matrix.T).trace()) / 2
    assert fisher.loss_increase(spec, difference) == pytest.approx(expected)
    assert fisher.loss_increase(spec, 0 * difference) == 0


def test_a_kronecker_product_is_the_whole_moment() -> None:
    spec = ConvSpec.parse(6, 8, (3, 3))
    factored, whole = equal_fishers()
    layer = random_layer(spec)
    assert factored.loss_increase(spec, layer.weight) == pytest.approx(whole.loss_increase(spec, layer.weight))
    assert torch.allclose(factored.input.channel_moment(6), whole.input.channel_moment(6))
    assert factored.input.size == whole.input.size == 54


def test_moments_of_another_convolution_are_refused() -> None:
    spec = ConvSpec.parse(6, 8, (3, 3), groups=2)
    random_fisher(spec).check(spec)
    for other in (ConvSpec.parse(4, 8, (3, 3), groups=2), ConvSpec.parse(3, 4, (3, 3))):
        with pytest.raises(SpecError, match=r"moments of sizes \(27, 4\) for 2 groups"):
            random_fisher(other).check(spec)
    transposed = ConvSpec.parse(6, 8, (3, 3), transposed=True)
    random_fisher(transposed).check(transposed)
    assert random_fisher(transposed).output.size == 72


def test_the_square_root_has_an_inverse_even_without_full_rank() -> None:
    matrix = random_moment(1, 6, torch.Generator().manual_seed(0), rank=3)[0]
    root, inverse = sqrt_and_inverse(matrix)
    torch.testing.assert_close(root @ root, matrix, rtol=0, atol=1e-6 * float(matrix.norm()))
    torch.testing.assert_close(root @ inverse, torch.eye(6, dtype=matrix.dtype))
    torch.testing.assert_close(root, root.T)
    assert sqrt_and_inverse(torch.zeros(3, 3))[0].isfinite().all()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_matrix_of_a_kernel_has_the_rows_of_its_moments(transposed: bool) -> None:
    spec = ConvSpec.parse(4, 6, (3, 3), transposed=transposed)
    rows = 4 if transposed else 6
    assert as_matrix(spec, random_layer(spec).weight).shape == (rows, 24 // rows * 9)


def test_a_moment_shrinks_to_the_identity_of_the_same_trace() -> None:
    whole = KroneckerMoment((random_moment(2, 6, torch.Generator().manual_seed(0)),))
    (half,), (own,) = whole.shrunk(10**9, least=0.5).factors, whole.factors
    mean = own.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * torch.eye(6, dtype=own.dtype)
    torch.testing.assert_close(half, (own + mean) / 2)
    torch.testing.assert_close(whole.shrunk(10**9, least=1.0).factors[0], mean)
    torch.testing.assert_close(whole.shrunk(10**12).factors[0], own)


@pytest.mark.parametrize(("samples", "steep"), [(20, 1.0), (20, 8.0), (200, 1.0), (200, 8.0)])
def test_a_moment_shrinks_by_nearly_the_best_share_for_that_many_samples(samples: int, steep: float) -> None:
    random = torch.Generator().manual_seed(0)
    true = torch.exp(-torch.linspace(0, steep, 40, dtype=torch.float64))
    drawn = torch.randn(8, samples, 40, generator=random, dtype=torch.float64) * true.sqrt()
    moments = drawn.mT @ drawn / samples
    eye = torch.eye(40, dtype=torch.float64) * moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]

    def missed(share: float) -> float:
        return float(((1 - share) * moments + share * eye - true.diag()).square().sum())

    found = float((KroneckerMoment((moments,)).shrunk(samples).factors[0] - true.diag()).square().sum())
    best = min(missed(k / 100) for k in range(101))
    assert found < 1.1 * best
    assert found < 0.95 * missed(0)
