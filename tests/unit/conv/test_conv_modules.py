"""Convolutions as modules: read, written, and left alone with a reason."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fxfact.conv import (
    ConvLayer,
    ConvSpec,
    Skip,
    compose_modules,
    insert_base,
    read_conv,
    run,
    to_torch,
    torch_conv_class,
    write_chain,
    write_conv,
)
from fxfact.conv.kernels import PointwiseConv2d
from tests.support import apart, random_input, random_layer


def test_a_module_is_read_as_it_computes(torch_conv: nn.Module) -> None:
    layer = read_conv(torch_conv.double())
    assert isinstance(layer, ConvLayer)
    x = random_input(layer.spec)
    assert apart(torch_conv(x), run(layer, x)) < 1e-14
    assert torch_conv(x).shape[2:] == layer.spec.output_size(tuple(x.shape[2:]))
    assert layer.spec.params == sum(p.numel() for p in torch_conv.parameters())
    assert to_torch(layer.spec, layer.weight).equal(torch_conv.weight)


def test_a_written_module_computes_the_layer(spec: ConvSpec) -> None:
    layer = random_layer(spec)
    x = random_input(spec)
    modules = nn.Sequential(*write_conv(spec, layer.weight, layer.bias))
    assert apart(run(layer, x), modules(x)) < 1e-14
    assert apart(run(layer, x[0]), modules(x[0])) < 1e-14
    assert run(layer, x).shape == spec.output_shape(tuple(x.shape))
    even = all(before == after for before, after in spec.padding)
    assert len(modules) == (1 if even or set(spec.stride) == {1} else 2)


def test_a_linear_layer_is_read_and_written_in_both_layouts() -> None:
    own = type("NonDynamic", (NonDynamicallyQuantizableLinear,), {})
    for module in (nn.Linear(4, 6), nn.Linear(4, 6, bias=False), NonDynamicallyQuantizableLinear(4, 6)):
        layer = read_conv(module)
        assert isinstance(layer, ConvLayer)
        assert layer.spec == ConvSpec.linear(4, 6, bias=module.bias is not None)
        assert layer.weight is module.weight
    assert isinstance(read_conv(own(4, 6)), Skip)
    in_out = nn.Parameter(torch.randn(4, 6), requires_grad=False)
    (module,) = write_conv(ConvSpec.linear(4, 6, transposed=True), in_out)
    assert type(module) is nn.Linear
    assert torch.equal(module.weight, in_out.T)
    assert not module.weight.requires_grad
    changed = nn.Linear(4, 6)
    changed.in_features = 5
    assert "its attributes describe a weight of (6, 5), but its weight is (6, 4)" in str(read_conv(changed))


def test_a_written_chain_has_the_memory_format_of_the_dense_weight() -> None:
    layers = [random_layer(ConvSpec.parse(4, 5, (1, 1))), random_layer(ConvSpec.parse(5, 6, (3, 3), bias=True))]
    specs, weights = [layer.spec for layer in layers], [layer.weight for layer in layers]
    like = torch.randn(6, 4, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    stages = write_chain(specs, weights, layers[-1].bias, like=like)
    assert all(stage.weight.is_contiguous(memory_format=torch.channels_last) for stage in stages)
    assert not any(stage.weight.requires_grad for stage in stages)
    assert [stage.bias is None for stage in stages] == [True, False]
    x = random_input(specs[0])
    whole = ConvLayer(ConvSpec.parse(4, 6, (3, 3), bias=True), compose_modules(specs, stages), layers[-1].bias)
    torch.testing.assert_close(nn.Sequential(*stages)(x), run(whole, x))


def test_parameters_are_written_as_they_are() -> None:
    spec = ConvSpec.parse(4, 6, (3, 3), transposed=True)
    weight = nn.Parameter(torch.randn(4, 6, 3, 3), requires_grad=False)
    (module,) = write_conv(spec, weight)
    assert module.weight is weight


def test_modules_that_are_not_plain_convolutions_are_skipped_with_a_reason() -> None:
    class Own(nn.Conv2d):
        pass

    hooked = nn.Conv2d(2, 2, 3)
    hooked.register_forward_hook(lambda *_: None)
    weight_normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3))
    complex_one = nn.Conv2d(2, 2, 3, dtype=torch.complex64)
    cases = {
        "hooks": hooked,
        "subclass": Own(2, 2, 3),
        "computed from other parameters": weight_normed,
        "complex64": complex_one,
        "not a convolution": nn.Embedding(2, 2),
    }
    for word, module in cases.items():
        found = read_conv(module)
        assert isinstance(found, Skip)
        assert word in found.reason


def test_an_inserted_base_runs_before_the_forward_of_torch() -> None:
    class Doubled(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Own(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    x = torch.randn(1, 2, 4, 4)
    for kind, expected in (
        (nn.Conv2d, lambda y: 2 * y),
        (Own, lambda y: 2 * (y - 1) + 1),
        (PointwiseConv2d, lambda y: 2 * y),
    ):
        module = kind(2, 2, 1)
        before = module(x)
        module.__class__ = insert_base(kind, Doubled, "Doubled")
        torch.testing.assert_close(module(x), expected(before))
        assert torch_conv_class(type(module)) is nn.Conv2d
        assert type(module).__name__ == ("DoubledOwn" if kind is Own else "DoubledConv2d")
