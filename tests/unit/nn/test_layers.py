"""Factorized layers, also in the cases in which TensorLy-Torch 0.5.0 is wrong or crashes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import fxfact.nn as fnn
from fxfact.conv import ConvLayer, read_conv
from fxfact.errors import ArgumentError, ArgumentTypeError, FxfactError, RankError, RefusedError, WeightError
from fxfact.factorizations import SpatialSVD, Tucker
from tests.support import apart

LAYERS = [fnn.CPConv, fnn.TuckerConv, fnn.TTConv]
VARIANTS = [
    (kind, implementation)
    for kind in LAYERS
    for implementation in ("factorized", "reconstructed", *(["mobilenet"] if kind is fnn.CPConv else []))
]
variants = pytest.mark.parametrize(("kind", "implementation"), VARIANTS, ids=lambda v: getattr(v, "__name__", v))
layers = pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeded(), dtype=dtype)


def full(kind: type[fnn.FactorizedConv], conv: nn.Module, **options: object) -> fnn.FactorizedConv:
    """Return the layer at its largest rank, at which it must equal the convolution."""
    probe = kind.from_conv(conv, 1, decompose_weights=False)
    most = probe.factorization.max_rank(probe.spec)
    return kind.from_conv(conv, most, **options)  # type: ignore[arg-type]


@variants
@pytest.mark.parametrize("order", [1, 2, 3])
def test_layer_from_random_has_the_shape_of_the_dense_layer(
    kind: type[fnn.FactorizedConv], implementation: str, order: int
) -> None:
    layer = kind(16, 24, 3, order=order, rank="same", stride=2, implementation=implementation, generator=seeded(order))
    dense = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[order - 1](16, 24, 3, stride=2)
    x = noise(16, 16, *[17] * order, dtype=torch.float32)
    y = layer(x)
    assert y.isfinite().all()
    assert y.shape == dense(x).shape
    by_tuple = kind(16, 24, (3,) * order, rank="same", stride=2, implementation=implementation, generator=seeded(order))
    assert by_tuple(x).equal(y)


@variants
def test_layer_from_random_has_the_output_variance_of_the_dense_layer(
    kind: type[fnn.FactorizedConv], implementation: str
) -> None:
    x = noise(8, 32, 9, 9, dtype=torch.float32)
    dense = torch.stack([nn.Conv2d(32, 32, 3)(x).var() for _ in range(20)]).mean().detach()
    ours = [kind(32, 32, 3, order=2, implementation=implementation, generator=seeded(k))(x).var() for k in range(20)]
    assert 0.8 < float(torch.stack(ours).mean().detach() / dense) < 1.25


@variants
def test_layer_can_be_traced_compiled_exported_copied_loaded_and_trained(
    kind: type[fnn.FactorizedConv], implementation: str
) -> None:
    layer = kind(6, 8, (3, 4), padding="same", stride=1, rank=0.5, implementation=implementation, generator=seeded())
    x = noise(2, 6, 9, 9, dtype=torch.float32)
    y = layer(x)
    torch.compiler.reset()
    assert torch.fx.symbolic_trace(layer)(x).equal(y)
    assert apart(y, torch.compile(layer, fullgraph=True, backend="aot_eager")(x)) < 1e-6
    assert apart(y, torch.export.export(layer, (x,)).module()(x)) < 1e-6
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other(x).equal(y)
    other = kind(6, 8, (3, 4), padding="same", stride=1, rank=0.5, implementation=implementation, generator=seeded(1))
    assert not other(x).equal(y)
    other.load_state_dict(layer.state_dict())
    assert other(x).equal(y)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert set(layer.state_dict()) == {
        name
        for k, stage in enumerate(layer.stages)
        for name in (f"stages.{k}.{n}" for n, _ in stage.named_parameters())
    }


def test_implementations_of_one_layer_agree() -> None:
    for conv in (nn.Conv2d(8, 12, 3, stride=(2, 1), padding=1), nn.Conv3d(4, 8, 3, groups=2), nn.Conv1d(8, 8, 5)):
        x = noise(2, conv.in_channels, *[9] * len(conv.kernel_size), dtype=torch.float32)
        for kind in LAYERS:
            made = [kind.from_conv(conv, 0.5, implementation=name)(x) for one, name in VARIANTS if one is kind]
            assert len(made) >= 2
            assert all(apart(made[0], other) < 1e-5 for other in made)


def test_state_of_one_implementation_loads_into_another_with_the_same_stages() -> None:
    conv, x = nn.Conv2d(6, 8, 3), noise(2, 6, 9, 9, dtype=torch.float32)
    made = fnn.TuckerConv.from_conv(conv, 0.5)
    other = fnn.TuckerConv.from_conv(conv, 0.5, implementation="reconstructed", decompose_weights=False)
    other.load_state_dict(made.state_dict())
    assert apart(made(x), other(x)) < 1e-5


CONVS = {
    "plain": nn.Conv2d(6, 8, 3),
    "stride (2,1)": nn.Conv2d(6, 8, 3, stride=(2, 1)),
    "padding (1,0)": nn.Conv2d(6, 8, 3, padding=(1, 0)),
    "padding same": nn.Conv2d(6, 8, 3, padding="same"),
    "padding same, even kernel": nn.Conv2d(6, 8, (4, 2), padding="same"),
    "padding valid": nn.Conv2d(6, 8, 3, padding="valid"),
    "dilation (1,2)": nn.Conv2d(6, 8, 3, dilation=(1, 2)),
    "reflect": nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
    "replicate": nn.Conv2d(6, 8, 3, padding=2, padding_mode="replicate"),
    "groups 2": nn.Conv2d(6, 8, 3, groups=2),
    "depthwise, multiplied": nn.Conv2d(6, 12, 3, groups=6),
    "no bias": nn.Conv2d(6, 8, 3, bias=False),
    "1-D": nn.Conv1d(6, 8, 5, stride=2, padding=2),
    "3-D": nn.Conv3d(6, 8, (3, 1, 3), stride=(1, 2, 1), padding=1),
}


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS.keys())
@layers
def test_layer_honours_every_attribute_of_the_convolution(kind: type[fnn.FactorizedConv], conv: nn.Module) -> None:
    conv = copy.deepcopy(conv).double()
    layer = full(kind, conv)
    x = noise(2, conv.in_channels, *[11] * len(conv.kernel_size))
    assert apart(conv(x), layer(x)) < 1e-10
    assert apart(conv(x[0]), layer(x[0])) < 1e-10
    back = layer.to_conv()
    assert type(back) is type(conv)
    ours, theirs = read_conv(back), read_conv(conv)
    assert isinstance(ours, ConvLayer)
    assert isinstance(theirs, ConvLayer)
    assert ours.spec == theirs.spec
    assert apart(conv(x), back(x)) < 1e-10


# Each of these is silently wrong, or crashes, in TensorLy-Torch 0.5.0.


@layers
def test_layer_takes_unequal_strides(kind: type[fnn.FactorizedConv]) -> None:
    conv = nn.Conv2d(16, 8, 3, stride=(2, 1), padding=1)
    assert full(kind, conv)(noise(2, 16, 24, 24, dtype=torch.float32)).shape == (2, 8, 12, 24)


@pytest.mark.parametrize("mode", ["reflect", "circular"])
@layers
def test_layer_takes_padding_modes(kind: type[fnn.FactorizedConv], mode: str) -> None:
    conv, x = nn.Conv2d(6, 8, 3, padding=1, padding_mode=mode).double(), noise(2, 6, 9, 9)
    assert apart(conv(x), full(kind, conv)(x)) < 1e-10


@layers
def test_layer_takes_padding_same(kind: type[fnn.FactorizedConv]) -> None:
    conv, x = nn.Conv2d(6, 8, 3, padding="same").double(), noise(2, 6, 9, 9)
    assert apart(conv(x), full(kind, conv)(x)) < 1e-10


@layers
def test_layer_takes_groups(kind: type[fnn.FactorizedConv]) -> None:
    conv, x = nn.Conv2d(6, 8, 3, groups=2).double(), noise(2, 6, 9, 9)
    assert apart(conv(x), full(kind, conv)(x)) < 1e-10


@layers
def test_layer_refuses_a_depthwise_convolution(kind: type[fnn.FactorizedConv]) -> None:
    with pytest.raises(RefusedError, match="depthwise"):
        kind.from_conv(nn.Conv2d(6, 6, 3, groups=6), 0.5)


@layers
def test_layer_takes_unbatched_input(kind: type[fnn.FactorizedConv]) -> None:
    layer, x = kind(6, 8, 3, order=2, generator=seeded()), noise(6, 9, 9, dtype=torch.float32)
    assert apart(layer(x[None])[0], layer(x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@layers
def test_layer_takes_half_precision(kind: type[fnn.FactorizedConv], dtype: torch.dtype) -> None:
    conv, x = nn.Conv2d(6, 8, 3, dtype=dtype), noise(2, 6, 9, 9).to(dtype)
    layer = full(kind, conv)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert apart(conv(x), layer(x)) < 0.05


@layers
def test_layer_does_not_share_the_bias(kind: type[fnn.FactorizedConv]) -> None:
    conv = nn.Conv2d(6, 8, 3)
    before = conv.bias.detach().clone()
    layer = kind.from_conv(conv, 0.5)
    with torch.no_grad():
        layer.bias.add_(1)
        layer.to_conv().bias.zero_()
    assert conv.bias.equal(before)
    assert layer.bias.equal(before + 1)


@pytest.mark.parametrize(("kind", "name"), [(fnn.CPConv, "mobilnet"), (fnn.TuckerConv, "mobilenet"), (fnn.TTConv, "")])
def test_layer_refuses_unknown_implementations(kind: type[fnn.FactorizedConv], name: str) -> None:
    with pytest.raises(ArgumentError, match="is one of"):
        kind.from_conv(nn.Conv2d(6, 8, 3), 0.5, implementation=name)


@layers
def test_layer_takes_transposed_convolutions(kind: type[fnn.FactorizedConv]) -> None:
    conv = nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1, groups=2).double()
    x = noise(2, 8, 5, 6)
    layer = kind.from_conv(conv, 36)
    assert apart(conv(x), layer(x)) < 1e-10
    assert apart(conv(x), layer.to_conv()(x)) < 1e-10
    assert isinstance(layer.to_conv(), nn.ConvTranspose2d)


def test_from_conv_is_reproducible_without_a_global_seed() -> None:
    conv, x = nn.Conv2d(6, 8, 3), noise(2, 6, 9, 9, dtype=torch.float32)
    assert fnn.CPConv.from_conv(conv, 0.5)(x).equal(fnn.CPConv.from_conv(conv, 0.5)(x))


def test_from_conv_keeps_dtype_mode_memory_format_and_requires_grad() -> None:
    conv = nn.Conv2d(6, 8, 3, dtype=torch.float64).eval().to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    layer = fnn.TuckerConv.from_conv(conv, 0.5)
    assert not layer.training
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert not layer.stages[0].weight.requires_grad
    assert layer.stages[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert layer.bias.requires_grad
    assert layer.to_conv().bias.requires_grad
    assert not layer.to_conv().weight.requires_grad
    transposed = nn.ConvTranspose2d(6, 8, 3).to(memory_format=torch.channels_last)
    with torch.no_grad():
        turned = fnn.TuckerConv.from_conv(transposed, 0.5)
    assert all(parameter.requires_grad for parameter in turned.parameters())
    assert turned.stages[1].weight.is_contiguous(memory_format=torch.channels_last)
    random = fnn.TuckerConv.from_conv(conv, 0.5, decompose_weights=False, generator=seeded())
    assert random.rank == layer.rank
    assert not random.weight.equal(layer.weight)


@pytest.mark.parametrize(
    ("kind", "fraction", "rank"),
    [
        (fnn.CPConv, "same", (2291,)),
        (fnn.CPConv, 0.5, (1145,)),
        (fnn.TuckerConv, 0.5, (310, 310)),
        (fnn.TuckerConv, 0.1, (115, 115)),
        (fnn.TTConv, 0.5, (39, 13, 39)),
    ],
)
def test_fraction_becomes_the_rank_of_tensorly(kind: type[fnn.FactorizedConv], fraction: object, rank: object) -> None:
    layer = kind(512, 512, 3, order=2, rank=fraction, device="meta")  # type: ignore[arg-type]
    assert layer.rank == rank


def test_factorized_conv_takes_any_factorization() -> None:
    conv, x = nn.Conv2d(6, 8, 3).double(), noise(2, 6, 9, 9)
    for method in ("spatial_svd", SpatialSVD(last_axes_first=True), "channel_svd", "cp-mobilenet"):
        layer = fnn.FactorizedConv.from_conv(conv, 0.6, factorization=method)
        dense = fnn.FactorizedConv.from_conv(conv, 0.6, factorization=method, implementation="reconstructed")
        assert apart(layer(x), dense(x)) < 1e-12
        assert sum(p.numel() for p in layer.parameters()) <= 0.65 * sum(p.numel() for p in conv.parameters())
    assert "spatial_svd, rank=(4,)" in repr(fnn.FactorizedConv(6, 8, (3, 3), factorization="spatial_svd", rank=4))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fnn.CPConv(6, 8, 3), FxfactError, "order="),
        (lambda: fnn.CPConv(6, 8, (3, 3), order=3), FxfactError, "kernel_size"),
        (lambda: fnn.CPConv(6, 8, 1, order=2), RefusedError, "svd"),
        (lambda: fnn.CPConv(6, 8, 3, order=2, rank=0), RankError, "positive"),
        (lambda: fnn.CPConv(6, 8, 3, order=2, rank=999), RankError, "within 1 and 54"),
        (lambda: fnn.TuckerConv(6, 8, 3, order=2, rank=(1, 2, 3)), RankError, "2 ranks"),
        (lambda: fnn.FactorizedConv(6, 8, (3, 3)), ArgumentError, "factorization= is needed"),
        (lambda: fnn.FactorizedConv(6, 8, (3, 3), factorization="block"), ArgumentError, "unknown"),
        (lambda: fnn.CPConv(6, 8, None), FxfactError, "kernel_size=None"),
        (lambda: fnn.CPConv(6, 8, 3.0, order=2), FxfactError, "ints"),
        (lambda: fnn.CPConv("6", 8, 3, order=2), FxfactError, "in_channels"),
        (lambda: fnn.CPConv(6, 8, 3, order="2"), FxfactError, "order"),
        (lambda: fnn.CPConv(6, 8, 3, order=2, padding=None), FxfactError, "padding"),
        (lambda: fnn.CPConv(6, 8, 3, order=2, dtype=torch.int32), ArgumentError, "int32"),
        (lambda: fnn.CPConv.from_conv(nn.Linear(2, 2)), ArgumentTypeError, "Linear"),
        (lambda: fnn.CPConv.from_conv("conv"), ArgumentTypeError, "str"),
        (lambda: fnn.CPConv.from_conv(nn.Conv2d(2, 2, 3), generator=3), ArgumentTypeError, "Generator, got int"),
        (lambda: fnn.CPConv(6, 8, 3, order=2, generator=3), ArgumentTypeError, "Generator, got int"),
        (lambda: fnn.CPConv.from_conv(weight_norm(nn.Conv2d(2, 2, 3))), RefusedError, "remove_parametrizations"),
        (lambda: fnn.CPConv.from_conv(nn.Conv2d(6, 8, 3, device="meta"), 0.5), WeightError, "meta"),
    ],
)
def test_invalid_arguments_are_refused(call: object, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["CP", "Cp", "Tucker", "TT"])
def test_factorization_names_are_those_of_tensorly_in_any_case(name: str) -> None:
    conv = nn.Conv2d(6, 8, 3)
    upper, lower = (fnn.FactorizedConv.from_conv(conv, 0.5, factorization=n) for n in (name, name.lower()))
    assert (upper.factorization, upper.rank, len(upper.stages)) == (lower.factorization, lower.rank, len(lower.stages))


def test_to_conv_returns_a_copy_in_the_dtype_of_the_layer_that_can_be_trained() -> None:
    layer = fnn.FactorizedConv.from_conv(nn.Conv2d(6, 8, 3), (8, 6), factorization=Tucker())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        dense = layer.to_conv()
        again = fnn.FactorizedConv.from_conv(dense, 0.5, factorization="tt")
    assert len(layer.stages) == 1
    assert dense.weight.equal(layer.stages[0].weight)
    assert dense.weight.data_ptr() != layer.stages[0].weight.data_ptr()
    for module in (dense, again, fnn.TuckerConv(6, 8, 3, order=2, rank=3).to_conv()):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
        module(torch.randn(1, 6, 9, 9)).sum().backward()


def test_layer_from_random_for_a_transposed_convolution_has_its_output_variance() -> None:
    torch.manual_seed(0)
    conv, x = nn.ConvTranspose2d(64, 4, 3), torch.randn(4, 64, 16, 16)
    layer = fnn.TuckerConv.from_conv(conv, 4, decompose_weights=False, generator=seeded())
    assert 0.5 < float((layer(x).var() / conv(x).var()).detach()) < 2
    assert 0.5 < float((layer.bias.std() / conv.bias.std()).detach()) < 2 or len(layer.bias) < 8
