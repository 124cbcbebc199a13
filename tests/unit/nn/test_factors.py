"""Layers and the factorized tensors of TensorLy."""

from __future__ import annotations

from typing import Any

import pytest
import tensorly
import torch
from tensorly.cp_tensor import CPTensor
from tensorly.tt_tensor import TTTensor
from tensorly.tucker_tensor import TuckerTensor
from torch import Tensor, nn

import fxfact.nn as fnn
from fxfact.errors import ArgumentError, ArgumentTypeError, FxfactError, RankError, RefusedError
from fxfact.factorizations import Tucker
from tests.support import apart


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel_of(factors: Any) -> Tensor:
    """The dense kernel (out, in, *kernel) that TensorLy computes."""
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        kernel = factors.to_tensor()
    return kernel.movedim(-1, 0) if isinstance(factors, TTTensor) else kernel


def random_factors(kind: type, shape: tuple[int, ...], rank: tuple[int, ...]) -> Any:
    """A random tensor of TensorLy for a kernel (out, in, *kernel)."""
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        if kind is CPTensor:
            return CPTensor((noise(*rank), [noise(n, *rank, seed=k) for k, n in enumerate(shape)]))
        if kind is TuckerTensor:
            return TuckerTensor((noise(*rank), [noise(n, r, seed=n) for n, r in zip(shape, rank, strict=True)]))
        sizes = (*shape[1:], shape[0])
        ends = zip((1, *rank), sizes, (*rank, 1), strict=True)
        return TTTensor([noise(*core, seed=k) for k, core in enumerate(ends)])


LAYERS = {
    "cp": (fnn.CPConv, "factorized", (3, 3)),
    "cp, mobilenet": (fnn.CPConv, "mobilenet", (3, 2)),
    "cp, thin": (fnn.CPConv, "factorized", (1, 3)),
    "cp, 3-D": (fnn.CPConv, "reconstructed", (3, 1, 2)),
    "tucker": (fnn.TuckerConv, "factorized", (3, 3)),
    "tucker, 1-D": (fnn.TuckerConv, "reconstructed", (5,)),
    "tt": (fnn.TTConv, "factorized", (3, 3)),
    "tt, thin": (fnn.TTConv, "factorized", (1, 3)),
    "tt, 3-D": (fnn.TTConv, "factorized", (3, 1, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_factors_compose_to_the_weight_and_back_to_an_equal_layer(name: str) -> None:
    kind, implementation, kernel = LAYERS[name]
    layer = kind(6, 8, kernel, padding=1, rank=0.5, implementation=implementation, dtype=torch.float64)
    factors = layer.factors
    assert apart(layer.weight.flatten(2), kernel_of(factors).flatten(2)) < 1e-12
    options = {"kernel_size": kernel} if implementation == "mobilenet" else {"implementation": implementation}
    again = fnn.FactorizedConv.from_factors(factors, padding=1, bias=layer.bias, **options)
    x = noise(2, 6, *[9] * len(kernel))
    assert apart(layer(x), again(x)) < 1e-12
    assert again.rank == layer.rank
    assert all(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_writing_to_factors_writes_to_the_layer(name: str) -> None:
    kind, implementation, kernel = LAYERS[name]
    layer = kind(6, 8, kernel, bias=False, rank=3, implementation=implementation)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        for factor in layer.factors.factors[:2]:
            factor.mul_(2)
    twice = 2 if kind is fnn.TTConv and kernel[0] == 1 else 4  # the core of an axis of size 1 is an identity
    assert apart(twice * before, layer.weight) < 1e-6


def test_factors_carry_gradients_to_the_stages() -> None:
    layer = fnn.CPConv(6, 8, (3, 3), rank=4)
    layer.factors.factors[0].square().sum().backward()
    assert layer.stages[-1].weight.grad is not None
    assert layer.stages[0].weight.grad is None


def test_factors_of_a_transposed_layer_are_those_of_its_weight() -> None:
    conv = nn.ConvTranspose2d(6, 8, 3, stride=2).double()
    for kind in (fnn.CPConv, fnn.TuckerConv, fnn.TTConv):
        layer = kind.from_conv(conv, 0.5)
        assert apart(layer.weight, kernel_of(layer.factors)) < 1e-12


@pytest.mark.parametrize(
    ("kind", "shape", "rank"),
    [
        (CPTensor, (8, 6, 3, 3), (5,)),
        (CPTensor, (8, 6, 3, 3), (60,)),
        (CPTensor, (8, 6, 1, 3), (4,)),
        (CPTensor, (8, 6, 1, 1), (4,)),
        (CPTensor, (8, 6, 1, 1), (9,)),
        (TuckerTensor, (8, 6, 3, 3), (4, 3, 2, 2)),
        (TuckerTensor, (8, 6, 3, 3), (10, 9, 4, 3)),
        (TuckerTensor, (8, 6, 1, 1), (4, 3, 1, 1)),
        (TuckerTensor, (8, 6, 5), (4, 3, 2)),
        (TTTensor, (8, 6, 3, 3), (4, 5, 3)),
        (TTTensor, (8, 6, 3, 3), (40, 50, 30)),
        (TTTensor, (8, 6, 1, 3), (4, 2, 3)),
        (TTTensor, (8, 6, 1, 1), (4, 2, 3)),
        (TTTensor, (8, 6, 2, 1, 3), (4, 2, 3, 3)),
    ],
)
def test_layer_of_factors_has_their_kernel_at_any_rank(
    kind: type, shape: tuple[int, ...], rank: tuple[int, ...]
) -> None:
    factors = random_factors(kind, shape, rank)
    layer = fnn.FactorizedConv.from_factors(factors, stride=2, padding=1, bias=noise(8))
    assert apart(kernel_of(factors), layer.weight) < 1e-9
    most = layer.factorization.max_rank(layer.spec)
    assert layer.rank == layer.factorization.clip(layer.spec, layer.rank)
    assert all(r <= m for r, m in zip(layer.rank, most, strict=True))
    x, order = noise(2, 6, *[9] * (len(shape) - 2)), len(shape) - 2
    dense = torch.convolution(
        x, kernel_of(factors), noise(8), [2] * order, [1] * order, [1] * order, False, [0] * order, 1
    )
    assert apart(dense, layer(x)) < 1e-9


def test_layer_of_factors_owns_its_tensors() -> None:
    factors, bias = random_factors(CPTensor, (8, 6, 3, 3), (4,)), noise(8)
    layer = fnn.CPConv.from_factors(factors, bias=bias)
    expected = kernel_of(factors).clone()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert kernel_of(factors).equal(expected)
    assert bias.equal(noise(8))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fnn.CPConv.from_factors(random_factors(TTTensor, (8, 6, 3), (2, 2))), ArgumentTypeError, "TTTensor"),
        (lambda: fnn.CPConv.from_factors([torch.ones(2)]), ArgumentTypeError, "got list"),
        (lambda: fnn.CPConv.from_factors(random_factors(CPTensor, (8, 6), (2,))), ArgumentError, "2 modes"),
        (
            lambda: fnn.TTConv.from_factors(random_factors(TTTensor, (8, 6, 9), (2, 2)), kernel_size=(3, 3)),
            ArgumentError,
            "kernel_size only with a CP",
        ),
        (lambda: fnn.CPConv(6, 8, (3, 3), groups=2, rank=2).factors, RefusedError, "2 groups"),
        (
            lambda: fnn.FactorizedConv(6, 8, (3, 3), factorization="spatial_svd", rank=2).factors,
            RefusedError,
            "spatial_svd",
        ),
    ],
)
def test_invalid_factors_are_refused(call: Any, error: type[FxfactError], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_factors_of_a_layer_without_a_pointwise_side_have_an_identity() -> None:
    layer = fnn.FactorizedConv(6, 8, (3, 3), factorization=Tucker(), rank=(3, 6))
    assert len(layer.stages) == 2
    assert layer.factors.factors[1].equal(torch.eye(6))
    assert apart(layer.weight, kernel_of(layer.factors)) < 1e-6


# TensorLy-Torch's arguments


@pytest.mark.parametrize(
    ("kind", "kernel", "written", "rank"),
    [
        (fnn.TuckerConv, (3, 3), (4, 5, 3, 3), (4, 5)),
        (fnn.TuckerConv, (5,), [4, 5, 5], (4, 5)),
        (fnn.TTConv, (3, 3), (1, 4, 5, 3, 1), (4, 5, 3)),
        (fnn.TTConv, (1, 3), (1, 4, 4, 3, 1), (4, 3)),
        (fnn.TTConv, (3, 1), (1, 4, 3, 3, 1), (4, 3)),
        (fnn.CPConv, (3, 3), (7,), (7,)),
    ],
)
def test_rank_may_be_written_as_tensorly_writes_it(
    kind: type[fnn.FactorizedConv], kernel: tuple[int, ...], written: Any, rank: tuple[int, ...]
) -> None:
    assert kind(6, 8, kernel, rank=written).rank == rank


@pytest.mark.parametrize(
    ("kind", "written", "translated"),
    [(fnn.TuckerConv, (4, 5, 2, 2), (4, 5)), (fnn.TTConv, (2, 4, 5, 3, 1), (4, 5, 3))],
)
def test_rank_that_cannot_be_translated_is_refused_with_one_that_can(
    kind: type[fnn.FactorizedConv], written: tuple[int, ...], translated: tuple[int, ...]
) -> None:
    with pytest.raises(RankError) as refused:
        kind(6, 8, (3, 3), rank=written)
    assert f"Pass {translated}" in str(refused.value)
    assert kind(6, 8, (3, 3), rank=translated).rank == translated


def test_train_rank_along_an_axis_of_size_1_must_not_change() -> None:
    with pytest.raises(RankError, match=r"Pass \(4, 3\)"):
        fnn.TTConv(6, 8, (1, 3), rank=(1, 4, 2, 3, 1))


@pytest.mark.parametrize("rank", [0.3, 4, (4, 3)])
def test_fixed_rank_modes_keep_their_size(rank: Any) -> None:
    conv = nn.Conv2d(6, 8, 3)
    assert fnn.TuckerConv.from_conv(conv, rank, fixed_rank_modes=[0]).rank[0] == 8
    assert fnn.TuckerConv.from_conv(conv, rank, fixed_rank_modes=[0]).rank[1] < 6
    assert fnn.TuckerConv(6, 8, (3, 3), rank=rank, fixed_rank_modes=(1, 2, 3)).rank[1] == 6
    assert fnn.TuckerConv(6, 8, (3, 3), rank=rank, fixed_rank_modes=(0, 1)).rank == (8, 6)
    plain, spatial = (fnn.TuckerConv.from_conv(conv, rank, fixed_rank_modes=modes) for modes in (None, "spatial"))
    assert plain.rank == spatial.rank


def test_fixed_rank_modes_are_only_for_tucker() -> None:
    with pytest.raises(ArgumentError, match="Leave it out"):
        fnn.CPConv(6, 8, (3, 3), fixed_rank_modes="spatial")
    for modes in ("channels", [4]):
        with pytest.raises(ArgumentError, match="among"):
            fnn.TuckerConv(6, 8, (3, 3), fixed_rank_modes=modes)


def test_decomposition_kwargs_are_options_of_the_factorization() -> None:
    conv = nn.Conv2d(6, 8, 3)
    layer = fnn.CPConv.from_conv(conv, 5, decomposition_kwargs={"n_iter_max": 3, "tol": 1e-3, "init": "svd"})
    assert (layer.factorization.sweeps, layer.factorization.tolerance) == (3, 1e-3)
    random = {"init": "random", "random_state": 0}
    one, same, other = (
        fnn.CPConv.from_conv(conv, 5, decomposition_kwargs=options)
        for options in (random, random, {**random, "random_state": 1})
    )
    assert one.weight.equal(same.weight)
    assert not one.weight.equal(other.weight)
    with pytest.raises(ArgumentError, match=r"'svd'.*n_iter_max"):
        fnn.TuckerConv.from_conv(conv, 5, decomposition_kwargs={"svd": "truncated_svd"})


def test_layer_has_the_attributes_of_a_convolution() -> None:
    conv = nn.Conv2d(6, 8, (3, 4), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, padding_mode="reflect")
    same, turned = nn.Conv2d(6, 8, (3, 4), padding="same"), nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=1)
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode transposed output_padding"
    for dense in (conv, same, turned):
        layer = fnn.FactorizedConv.from_conv(dense, 2, factorization="tucker")
        assert [getattr(layer, name) for name in names.split()] == [getattr(dense, name) for name in names.split()]
        assert layer.order == 2


@pytest.mark.parametrize("name", LAYERS)
def test_reset_parameters_gives_the_kernel_a_standard_deviation(name: str) -> None:
    kind, implementation, kernel = LAYERS[name]
    layer = kind(16, 24, kernel, rank=8, implementation=implementation)
    generator = torch.Generator().manual_seed(0)
    variances = []
    for _ in range(60):
        layer.reset_parameters(0.02, generator=generator)
        variances.append(layer.weight.detach().var())
    assert 0.75 < float(torch.stack(variances).mean().sqrt()) / 0.02 < 1.25
    assert not layer.bias.any()


@pytest.mark.parametrize("std", [0, -1.0, float("inf"), True, torch.Generator()])
def test_reset_parameters_refuses_what_is_no_standard_deviation(std: Any) -> None:
    with pytest.raises(ArgumentError, match="std must be"):
        fnn.CPConv(6, 8, (3, 3), rank=2).reset_parameters(std)
