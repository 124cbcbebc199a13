"""Convolutions of any order against sums over the windows that ``Tensor.unfold`` returns."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfact.conv import ConvNd, ConvSpec, read_conv, run_weight
from fxfact.errors import ArgumentError, SpecError
from tests.support import apart, random_layer

KERNEL = (3, 2, 1, 3, 2)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "strided": {"stride": (2, 1, 3, 1, 2)},
    "padded": {"padding": (1, 0, 2, 1, 1)},
    "strided, padded": {"stride": 2, "padding": 1, "bias": True},
    "dilated": {"dilation": (1, 2, 3, 1, 2), "padding": 1},
    "same": {"padding": "same"},
    "groups": {"groups": 2, "bias": True},
    "depthwise": {"groups": 4, "stride": 2},
    "reflect": {"padding": (1, 0, 1, 1, 1), "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": "same", "padding_mode": "circular", "bias": True},
    "transposed": {"transposed": True, "bias": True},
    "transposed, strided": {"transposed": True, "stride": (2, 1, 3, 2, 1), "padding": (1, 0, 0, 1, 1), "bias": True},
    "transposed, grouped": {
        "transposed": True,
        "stride": 2,
        "output_padding": 1,
        "groups": 2,
        "dilation": (1, 2, 1, 1, 2),
    },
    "transposed, cropped": {"transposed": True, "padding": (2, 1, 0, 3, 2)},
}


def spec_of_order(order: int, name: str) -> ConvSpec:
    settings = {key: value[:order] if isinstance(value, tuple) else value for key, value in SETTINGS[name].items()}
    return ConvSpec.parse(4, 8, KERNEL[:order], **settings)


def sample(spec: ConvSpec) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sizes = [6, 5, 4, 6, 5][: spec.order]
    return torch.randn(2, spec.in_channels, *sizes, generator=generator, dtype=torch.float64)


def oracle(spec: ConvSpec, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The convolution by definition: windows of ``unfold``, summed over input channels and kernel positions."""
    if spec.transposed:
        return transposed_oracle(spec, weight, bias, x)
    for axis, (before, after) in enumerate(spec.padding):
        indices = torch.arange(-before, x.shape[axis + 2] + after)
        size = x.shape[axis + 2]
        if spec.padding_mode == "zeros":
            x = F.pad(x, [0, 0] * (spec.order - axis - 1) + [before, after])
            continue
        if spec.padding_mode == "circular":
            indices = indices % size
        elif spec.padding_mode == "replicate":
            indices = indices.clamp(0, size - 1)
        else:
            indices = (size - 1) - ((size - 1) - indices.abs()).abs()
        x = x.index_select(axis + 2, indices)
    for axis in range(spec.order):
        reach = spec.dilation[axis] * (spec.kernel_size[axis] - 1) + 1
        x = x.unfold(axis + 2, reach, spec.stride[axis])[..., :: spec.dilation[axis]]
    groups = spec.groups
    blocks = x.unflatten(1, (groups, -1)).flatten(3 + spec.order).unflatten(0, (-1,))
    kernels = weight.flatten(2).unflatten(0, (groups, -1))
    output = torch.einsum("bgi...k,goik->bgo...", blocks, kernels).flatten(1, 2)
    return output if bias is None else output + bias.reshape(-1, *[1] * spec.order)


def transposed_oracle(spec: ConvSpec, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The transposed convolution by definition: the adjoint of the one with input and output swapped."""
    swapped = weight.unflatten(0, (spec.groups, -1)).transpose(1, 2).flatten(0, 1)
    forward = replace(
        spec,
        in_channels=spec.out_channels,
        out_channels=spec.in_channels,
        transposed=False,
        output_padding=(0,) * spec.order,
        bias=False,
    )
    zeros = torch.zeros(*x.shape[:1], spec.out_channels, *spec.output_size(tuple(x.shape[2:])), dtype=x.dtype)
    zeros.requires_grad_()
    (output,) = torch.autograd.grad(oracle(forward, swapped.detach(), None, zeros), zeros, x)
    return output if bias is None else output + bias.reshape(-1, *[1] * spec.order)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_convolution_of_any_order_equals_the_definition(order: int, name: str) -> None:
    spec = spec_of_order(order, name)
    layer, x = random_layer(spec), sample(spec)
    found = run_weight(spec, layer.weight, layer.bias, x)
    assert apart(oracle(spec, layer.weight, layer.bias, x), found) < 1e-12
    assert tuple(found.shape) == spec.output_shape(tuple(x.shape))
    assert apart(found[0], run_weight(spec, layer.weight, layer.bias, x[0])) < 1e-12


@pytest.mark.parametrize("axes", [(), (0,), (3,), (0, 4), (1, 2, 3), (0, 1, 2, 4)])
def test_axes_without_effect_are_folded(axes: tuple[int, ...]) -> None:
    kernel = tuple(3 if axis in axes else 1 for axis in range(5))
    for transposed in (False, True):
        spec = ConvSpec.parse(4, 8, kernel, stride=tuple(2 if k > 1 else 1 for k in kernel), transposed=transposed)
        layer, x = random_layer(spec), sample(spec)
        assert apart(oracle(spec, layer.weight, None, x), run_weight(spec, layer.weight, None, x)) < 1e-12


@pytest.mark.parametrize("name", ["strided, padded", "circular", "transposed, grouped"])
def test_gradients_of_order_4_are_those_of_finite_differences(name: str) -> None:
    settings = {k: v[:4] if isinstance(v, tuple) else v for k, v in SETTINGS[name].items()}
    spec = ConvSpec.parse(2, 2, (2, 2, 1, 2), **settings)
    layer = random_layer(spec)
    x = torch.randn(1, 2, 3, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = layer.weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: run_weight(spec, w, layer.bias, x), (x, weight))


@pytest.mark.parametrize("name", ["strided, padded", "reflect", "transposed, grouped"])
def test_module_of_order_4_can_be_traced_compiled_exported_copied_and_trained(name: str) -> None:
    settings = {k: v[:4] if isinstance(v, tuple) else v for k, v in SETTINGS[name].items()}
    module, x = ConvNd(4, 8, KERNEL[:4], **settings), sample(spec_of_order(4, name)).float()
    y = module(x)
    torch.compiler.reset()
    assert torch.fx.symbolic_trace(nn.Sequential(module))(x).equal(y)
    assert apart(y, torch.compile(module, fullgraph=True, backend="aot_eager")(x)) < 1e-6
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert apart(module(x[:1]), program.module()(x[:1])) < 1e-6
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other(x).equal(y)
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    ("dense", "settings"),
    [
        (nn.Conv1d, {"stride": 2, "padding": 1}),
        (nn.Conv2d, {"padding": (1, 0), "groups": 2}),
        (nn.Conv3d, {"padding": 1, "padding_mode": "reflect"}),
        (nn.ConvTranspose2d, {"stride": 2, "output_padding": 1, "groups": 2}),
    ],
)
def test_module_is_like_that_of_pytorch(dense: type, settings: dict[str, Any]) -> None:
    theirs = dense(4, 8, 3, **settings)
    order = len(theirs.kernel_size)
    ours = ConvNd(4, 8, 3, order=order, transposed=theirs.transposed, **settings)
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, *[7] * order)
    assert apart(theirs(x), ours(x)) < 1e-6
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "output_padding"):
        assert getattr(ours, name) == getattr(theirs, name)
    one, other = dense(64, 64, 3), ConvNd(64, 64, 3, order=order, transposed=theirs.transposed)
    assert 0.9 < float((one.weight.std() / other.weight.std()).detach()) < 1.1


def test_transposed_module_takes_an_output_size() -> None:
    module, x = ConvNd(4, 8, 3, stride=2, order=4, transposed=True), torch.randn(1, 4, 3, 3, 3, 3)
    for size in product([7, 8], repeat=4):
        assert tuple(module(x, size).shape) == (1, 8, *size)
    with pytest.raises(SpecError, match="no output of size"):
        module(x, (9, 7, 7, 7))
    with pytest.raises(ArgumentError, match="only a transposed"):
        ConvNd(4, 8, 3, order=4)(x, (7, 7, 7, 7))


def test_module_without_a_bias_has_none() -> None:
    module = ConvNd(4, 8, (3,) * 4, bias=False)
    assert module.bias is None
    assert list(module.state_dict()) == ["weight"]
    assert read_conv(module).spec == module.spec


def test_kernel_beyond_the_memory_is_refused_before_it_is_allocated() -> None:
    with pytest.raises(ArgumentError, match=r"GiB, and the device cpu has"):
        ConvNd(64, 64, 3, order=30)
    assert ConvNd(64, 64, 3, order=12, device="meta").weight.numel() == 64 * 64 * 3**12
