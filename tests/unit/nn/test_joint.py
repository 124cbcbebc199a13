"""Joint layers: several convolutions that share one factorized tensor."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact.nn as fnn
from fxfact.errors import ArgumentError, ArgumentTypeError, FxfactError, RankError, RefusedError, SpecError
from tests.support import apart

FACTORIZATIONS = ["cp", "tucker", "tt"]
factorizations = pytest.mark.parametrize("factorization", FACTORIZATIONS)
KERNELS = [(5,), (3, 3), (1, 3), (1, 1), (2, 3, 1, 2)]
FULL = {"cp": 1000, "tucker": (3, 8, 6), "tt": (1000,) * 20}


def convs_of(kernel: tuple[int, ...]) -> list[nn.Module]:
    """Three convolutions of one shape with settings of their own, the second without a bias."""
    settings: list[dict[str, Any]] = [
        {"padding": 1},
        {"stride": 2, "bias": False},
        {"padding": "same", "padding_mode": "circular"},
    ]
    dense = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d, 4: fnn.ConvNd}[len(kernel)]
    return [dense(6, 8, kernel, dtype=torch.float64, **options) for options in settings]


def sample(kernel: tuple[int, ...]) -> Tensor:
    sizes = [5, 6, 4, 5] if len(kernel) == 4 else [9, 8]
    return torch.randn(2, 6, *sizes[: len(kernel)], dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def full_rank(factorization: str, kernel: tuple[int, ...]) -> Any:
    return (1000,) * (len(kernel) + 2) if factorization == "tt" else FULL[factorization]


@pytest.mark.parametrize("implementation", ["factorized", "reconstructed"])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@factorizations
def test_joint_layer_at_full_rank_equals_its_convolutions(
    factorization: str, kernel: tuple[int, ...], implementation: str
) -> None:
    convs, x = convs_of(kernel), sample(kernel)
    options = {"factorization": factorization, "implementation": implementation}
    joint = fnn.JointConv.from_conv_list(convs, full_rank(factorization, kernel), **options)
    assert len(joint) == 3
    for conv, ours in zip(convs, joint, strict=True):
        assert apart(conv(x), ours(x)) < 1e-10
        assert apart(conv(x[0]), ours(x[0])) < 1e-10
        assert apart(conv.weight, ours.weight) < 1e-10
        assert apart(conv(x), ours.to_conv()(x)) < 1e-10
        assert (ours.stride, ours.padding_mode, ours.spec.bias) == (
            conv.stride,
            conv.padding_mode,
            conv.bias is not None,
        )


@factorizations
def test_joint_layer_is_closer_than_separate_ones_where_kernels_are_alike(factorization: str) -> None:
    torch.manual_seed(0)
    base = torch.randn(16, 16, 3, 3)
    convs = [nn.Conv2d(16, 16, 3, bias=False) for _ in range(4)]
    for k, conv in enumerate(convs):
        conv.weight.data = (k + 1) * base + 0.1 * torch.randn(16, 16, 3, 3)
    joint = fnn.JointConv.from_conv_list(convs, 0.2, factorization=factorization)
    params = sum(p.numel() for p in joint.parameters())
    kind = {"cp": fnn.CPConv, "tucker": fnn.TuckerConv, "tt": fnn.TTConv}[factorization]
    for rank in range(16 if kind is fnn.TuckerConv else 40, 0, -1):
        empty = kind.from_conv(convs[0], rank, decompose_weights=False)
        if len(convs) * sum(p.numel() for p in empty.parameters()) <= params:
            break
    apart_layers = [kind.from_conv(conv, rank) for conv in convs]

    def error(layers: Any) -> float:
        return sum(
            float((layer.weight - conv.weight).square().sum().detach())
            for layer, conv in zip(layers, convs, strict=True)
        )

    assert error(joint) < error(apart_layers)


@factorizations
def test_convolutions_of_a_joint_layer_share_its_parameters(factorization: str) -> None:
    joint = fnn.FactorizedConv.from_conv_list(convs_of((3, 3)), 0.5, factorization=factorization)
    model = nn.Sequential(joint[0], nn.Conv2d(8, 6, 1, dtype=torch.float64), joint[2])
    shared = {id(p) for p in joint.parameters()}
    assert shared < {id(p) for p in model.parameters()}
    model(sample((3, 3))).square().mean().backward()
    assert all(p.grad is not None for p in joint.parameters())


@factorizations
def test_joint_layer_has_a_tuple_of_layers(factorization: str) -> None:
    joint = fnn.JointConv(6, 8, (3, 3), padding=1, n_layers=(2, 3), factorization=factorization, rank=0.5)
    x = torch.randn(2, 6, 7, 7)
    outputs = [joint[i, j](x) for i in range(2) for j in range(3)]
    assert {tuple(y.shape) for y in outputs} == {(2, 8, 7, 7)}
    assert not outputs[0].equal(outputs[5])
    assert joint[-1, -1](x).equal(outputs[5])
    joint.set((0, 1), stride=2, padding=(0, 1), bias=torch.ones(8))
    assert joint[0, 1](x).shape == (2, 8, 3, 4)
    assert joint[0, 0].stride == (1, 1)
    dense = joint[1, 2].to_conv()
    assert apart(dense(x), outputs[5]) < 1e-5


@factorizations
def test_joint_layer_from_random_has_the_standard_deviation_of_dense_layers(factorization: str) -> None:
    generator = torch.Generator().manual_seed(0)
    joint = fnn.JointConv(16, 16, (3, 3), n_layers=4, factorization=factorization, rank=0.5)
    variances = []
    for _ in range(40):
        joint.reset_parameters(generator=generator)
        variances += [layer.weight.detach().var() for layer in joint]
    expected = nn.Conv2d(16, 16, 3).weight.detach().std()
    assert 0.7 < float(torch.stack(variances).mean().sqrt() / expected) < 1.4


@factorizations
def test_fraction_of_a_joint_layer_is_one_of_all_its_parameters(factorization: str) -> None:
    joint = fnn.JointConv(64, 64, (3, 3), n_layers=8, factorization=factorization, rank=0.1, bias=False)
    params = sum(p.numel() for p in joint.parameters())
    assert params < 0.12 * 8 * 64 * 64 * 9
    assert params > (0.03 if factorization == "tt" else 0.08) * 8 * 64 * 64 * 9


@factorizations
def test_convolution_of_a_joint_layer_can_be_traced_compiled_exported_copied_and_loaded(factorization: str) -> None:
    joint = fnn.JointConv(6, 8, (3, 3), n_layers=3, factorization=factorization, rank=0.5)
    model, x = nn.Sequential(joint[0], nn.Conv2d(8, 6, 1), joint[2]), torch.randn(2, 6, 9, 9)
    y = model(x)
    assert torch.fx.symbolic_trace(model)(x).equal(y)
    torch.compiler.reset()
    assert apart(y, torch.compile(model, fullgraph=True, backend="aot_eager")(x)) < 1e-5
    assert apart(y, torch.export.export(model, (x,)).module()(x)) < 1e-5
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other(x).equal(y)
        assert other[0].joint is other[2].joint
    again = fnn.JointConv(6, 8, (3, 3), n_layers=3, factorization=factorization, rank=0.5)
    other = nn.Sequential(again[0], nn.Conv2d(8, 6, 1), again[2])
    other.load_state_dict(model.state_dict())
    assert other(x).equal(y)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fnn.JointConv.from_conv_list([nn.Conv2d(2, 2, 3), nn.Conv2d(2, 3, 3)]), RefusedError, "number 1"),
        (lambda: fnn.JointConv.from_conv_list([nn.Conv2d(2, 2, 3)]), ArgumentError, "at least two"),
        (lambda: fnn.JointConv.from_conv_list([nn.Conv2d(2, 2, 3), nn.Linear(2, 2)]), ArgumentTypeError, "number 1"),
        (lambda: fnn.JointConv.from_conv_list([nn.Conv2d(2, 2, 3, groups=2)] * 2), RefusedError, "groups"),
        (lambda: fnn.JointConv.from_conv_list([nn.ConvTranspose2d(2, 2, 3)] * 2), RefusedError, "transposed"),
        (lambda: fnn.JointConv(2, 2, (3, 3), n_layers=0), ArgumentError, "n_layers"),
        (lambda: fnn.JointConv(2, 2, (3, 3), n_layers=2, factorization="svd"), ArgumentError, "one of"),
        (lambda: fnn.JointConv(2, 2, (3, 3), n_layers=2, implementation="mobilenet"), ArgumentError, "implementation"),
        (lambda: fnn.JointConv(2, 2, (3, 3), n_layers=2, rank=(1, 2)), RankError, "one int"),
        (lambda: fnn.JointConv(2, 2, (3, 3), n_layers=2, factorization="tucker", rank=(1, 2)), RankError, "3 entries"),
        (lambda: fnn.JointConv(2, 2, (3, 3), n_layers=2, factorization="tt", rank=(1, 2)), RankError, "4 ranks"),
        (lambda: fnn.JointConv(2, 2, (3, 3), n_layers=2)[2], IndexError, "n_layers"),
        (
            lambda: fnn.JointConv(64, 64, 3, order=30, n_layers=2, factorization="tucker", rank=32),
            ArgumentError,
            "GiB, and the device",
        ),
        (lambda: fnn.JointConv(2, 2, (3, 3), n_layers=2)[0, 1], ArgumentError, "index"),
        (lambda: fnn.JointConv(2, 2, (3, 3), n_layers=2).set(0, groups=2), ArgumentError, "'groups'"),
        (lambda: fnn.JointConv(2, 2, (3, 3), n_layers=2).set(0, stride=0), SpecError, "stride"),
        (
            lambda: fnn.JointConv(2, 2, (3, 3), n_layers=2, bias=False).set(0, bias=torch.ones(2)),
            ArgumentError,
            "biases",
        ),
    ],
)
def test_invalid_joint_layers_are_refused(call: Any, error: type[FxfactError], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
