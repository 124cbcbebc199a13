"""What is written to the weight or bias of a factorized layer reaches its stages, or is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from fxfact.conv import ConvSpec, FactorizedModule, Skip, factorize_module, run_weight, write_chain, write_conv
from fxfact.conv.convolve import from_torch
from fxfact.errors import ArgumentError, WeightError
from fxfact.factorizations import Factorization, Tucker, resolve_rank
from fxfact.nn import CPConv, FactorizedConv, TuckerConv
from tests.support import ALL, SPECS, apart, by_name, copied_state, has_state, quick, random_input, random_layer

PLAIN = ConvSpec.parse(6, 8, (3, 3), padding=1, bias=True)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def chain_module(
    spec: ConvSpec = PLAIN, method: Factorization | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """A convolution that was turned into a chain. None if the method has no chain of two stages for it."""
    method, layer = quick(method or Tucker()), random_layer(spec, torch.float32)
    rank = resolve_rank(method, spec, 0.6, clip=True)
    modules = write_conv(spec, layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))
    if isinstance(rank, Skip) or len(modules) > 1:
        return None
    chain = method.decompose(layer, rank)
    if len(chain.layers) < 2:
        return None
    bias = None if chain.bias is None else chain.bias.to(dtype)
    (module,) = modules
    stages = write_chain(chain.specs, [stage.weight.to(dtype) for stage in chain.layers], bias, like=modules[0].weight)
    factorize_module(module, spec, chain.specs, stages, "body.conv")
    assert isinstance(module, FactorizedModule)
    return module.requires_grad_()


def tuckers() -> list[Any]:
    """The same layer in both forms: in place of a convolution, and to build models with."""
    return [chain_module(), TuckerConv(6, 8, 3, padding=1, order=2, rank=0.5)]


def gains(spec: ConvSpec, side: str, dtype: torch.dtype) -> Tensor:
    """Gains of one side that broadcast with the weight in PyTorch's layout."""
    channels = spec.out_channels if side == "out" else spec.in_channels
    values = torch.randn(channels, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values[0] = 0 if channels > 1 else -2
    if side == "out":
        kernel = values.reshape(-1, 1).expand(-1, spec.in_channels // spec.groups)
    else:
        kernel = values.reshape(spec.groups, 1, -1).expand(-1, spec.out_channels // spec.groups, -1)
    kernel = kernel.reshape(spec.out_channels, -1, *[1] * spec.order)
    return from_torch(spec, kernel).to(dtype)  # swapping the channels twice changes nothing


def run(layer: Any, weight: Tensor, x: Tensor) -> Tensor:
    spec = layer._dense
    bias = None if layer.bias is None else layer.bias.detach().double()
    return run_weight(spec, from_torch(spec, weight.detach().double()), bias, x.double())


# Scaling of channels


@pytest.mark.parametrize("method", ALL, ids=by_name)
@pytest.mark.parametrize("name", SPECS)
def test_scaled_channels_act_for_every_factorization_and_convolution(name: str, method: Factorization) -> None:
    spec = SPECS[name]
    layer = chain_module(spec, method)
    if layer is None:
        return
    x = random_input(spec, torch.float32)
    for side in ("out", "in"):
        wanted = layer.weight.detach() * gains(spec, side, torch.float32)
        with torch.no_grad():
            layer.weight.mul_(gains(spec, side, torch.float32))
        assert apart(run(layer, wanted, x), layer(x)) < 1e-5
        torch.testing.assert_close(layer.weight, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["plain", "groups", "1-D", "3-D", "transposed", "transposed, grouped, dilated"])
def test_scaled_channels_act_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    layer = chain_module(spec, dtype=dtype)
    x = random_input(spec, dtype)
    wanted = layer.weight.detach() * gains(spec, "out", dtype)
    layer.weight.data = layer.weight.data * gains(spec, "out", dtype)
    assert apart(run(layer, wanted, x), layer(x)) < TOLERANCE[dtype]
    before = copied_state(layer)
    with pytest.raises(WeightError, match=r"body\.conv"):
        layer.weight.data += 0.05
    assert has_state(layer, before)


def scale_rows(layer: Any, gain: Tensor) -> None:
    with torch.no_grad():
        for row, factor in zip(layer.weight, gain.flatten(), strict=True):
            row.mul_(factor)


def in_place(write: Callable[[Tensor, Tensor], Any]) -> Callable[[Any, Tensor], None]:
    def call(layer: Any, gain: Tensor) -> None:
        with torch.no_grad():
            write(layer.weight, gain)

    return call


def multiply(layer: Any, gain: Tensor) -> None:
    with torch.no_grad():
        layer.weight *= gain


def multiply_data(layer: Any, gain: Tensor) -> None:
    layer.weight.data *= gain


def set_data(layer: Any, gain: Tensor) -> None:
    layer.weight.data = layer.weight.data * gain


def set_parameter(layer: Any, gain: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight * gain)


def register(layer: Any, gain: Tensor) -> None:
    layer.register_parameter("weight", nn.Parameter(layer.weight * gain))


def in_inference_mode(layer: Any, gain: Tensor) -> None:
    with torch.inference_mode():
        layer.weight.mul_(gain)


def with_old_aliases(layer: Any, gain: Tensor) -> None:
    first, second = layer.weight, layer.weight
    with torch.no_grad():
        first.mul_(gain * 2)
        second.div_(4)
        first.mul_(2)


SCALINGS: dict[str, Callable[[Any, Tensor], None]] = {
    "mul_": in_place(lambda weight, gain: weight.mul_(gain)),
    "copy_": in_place(lambda weight, gain: weight.copy_(weight * gain)),
    "detach().copy_": lambda layer, gain: layer.weight.detach().copy_(layer.weight * gain),
    "item assignment": in_place(lambda weight, gain: weight.__setitem__(slice(None), weight * gain)),
    "view": in_place(lambda weight, gain: weight.view(8, -1).mul_(gain.view(8, 1))),
    "rows": scale_rows,
    "out=": in_place(lambda weight, gain: torch.mul(weight, gain, out=weight)),
    "foreach": in_place(lambda weight, gain: torch._foreach_mul_([weight, torch.ones(8, 1, 1, 1)], [gain, gain])),
    "operator": in_place(torch.ops.aten.mul_.Tensor),
    "*=": multiply,
    "data *=": multiply_data,
    "data =": set_data,
    "parameter": set_parameter,
    "register_parameter": register,
    "vector_to_parameters": lambda layer, gain: nn.utils.vector_to_parameters(
        (layer.weight * gain).flatten(), [layer.weight]
    ),
    "inference mode": in_inference_mode,
    "old aliases": with_old_aliases,
}


@pytest.mark.parametrize("spelling", SCALINGS)
def test_every_spelling_of_a_scaling_acts(spelling: str) -> None:
    gain = (torch.arange(8.0) - 2).view(8, 1, 1, 1)
    for layer in tuckers():
        x = torch.randn(2, 6, 7, 7)
        expected = (layer(x) - layer.bias.view(-1, 1, 1)) * gain.view(8, 1, 1) + layer.bias.view(-1, 1, 1)
        SCALINGS[spelling](layer, gain)
        assert apart(expected, layer(x)) < 1e-6
        assert all(isinstance(parameter, nn.Parameter) for parameter in layer.parameters())
        layer(x).square().mean().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())


def test_both_sides_are_scaled_in_one_write() -> None:
    layer, x = chain_module(), torch.randn(2, 6, 7, 7)
    out, into = torch.randn(8), torch.randn(6)
    with torch.no_grad():
        bias = layer.bias.clone()
        expected = (layer(x * into.view(-1, 1, 1)) - bias.view(-1, 1, 1)) * out.view(-1, 1, 1) + bias.view(-1, 1, 1)
        layer.weight.copy_(layer.weight * out.view(-1, 1, 1, 1) * into.view(1, -1, 1, 1))
        assert apart(expected, layer(x)) < 1e-5


@pytest.mark.parametrize("zero", [lambda weight: weight.zero_(), lambda weight: weight.fill_(0), nn.init.zeros_])
def test_zeros_act(zero: Callable[[Tensor], Any]) -> None:
    layer = chain_module()
    with torch.no_grad():
        zero(layer.weight)
    assert layer(torch.randn(1, 6, 5, 5)).equal(layer.bias.view(1, 8, 1, 1).expand(1, 8, 5, 5))


def test_a_write_that_changes_nothing_leaves_the_stages_as_they_are() -> None:
    layer = chain_module()
    before = copied_state(layer)
    with torch.no_grad():
        layer.weight.clamp_(-100, 100)
        layer.weight.copy_(layer.weight.clone())
    layer.weight.data = layer.weight.data
    assert has_state(layer, before)


# Refused writes


def writes(write: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def call(layer: Any) -> None:
        with torch.no_grad():
            write(layer.weight)

    return call


def subtract(layer: Any) -> None:
    with torch.no_grad():
        layer.weight -= 0.1


def add_to_data(layer: Any) -> None:
    layer.weight.data += 0.1


def delete(layer: Any) -> None:
    del layer.weight


def replace(layer: Any) -> None:
    layer._parameters["weight"] = nn.Parameter(torch.zeros(8, 6, 3, 3))


REFUSED: dict[str, Callable[[Any], Any]] = {
    "add_": writes(lambda weight: weight.add_(0.1)),
    "clamp_": writes(lambda weight: weight.clamp_(-0.01, 0.01)),
    "one value": writes(lambda weight: weight[1, 2, 0, 0].add_(1)),
    "item assignment": writes(lambda weight: weight.__setitem__((0, 0, 0, 0), 7.0)),
    "a mask": writes(lambda weight: weight.masked_fill_(torch.eye(3).bool(), 0)),
    "NaN": writes(lambda weight: weight.mul_(float("nan"))),
    "Inf": writes(lambda weight: weight.mul_(float("inf"))),
    "set_": writes(lambda weight: weight.set_(torch.zeros(8, 6, 3, 3))),
    "-=": subtract,
    "data +=": add_to_data,
    "data of another shape": lambda layer: setattr(layer.weight, "data", torch.zeros(3)),
    "kaiming": lambda layer: nn.init.kaiming_normal_(layer.weight),
    "constant": lambda layer: nn.init.constant_(layer.weight, 0.5),
    "outside of no_grad": lambda layer: layer.weight.mul_(2),
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(8, 6, 3, 3))),
    "parameter of another shape": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(8, 6, 1, 1))),
    "meta parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(8, 6, 3, 3, device="meta"))),
    "None": lambda layer: setattr(layer, "weight", None),
    "del": delete,
    "in _parameters": replace,
    "functional_call": lambda layer: torch.func.functional_call(
        layer, {"weight": torch.zeros(8, 6, 3, 3)}, (torch.zeros(1, 6, 5, 5),)
    ),
    "gradient": lambda layer: setattr(layer.weight, "grad", torch.ones(8, 6, 3, 3)),
    "hook": lambda layer: layer.weight.register_hook(lambda grad: grad * 0),
    "hook after accumulation": lambda layer: layer.weight.register_post_accumulate_grad_hook(lambda tensor: None),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune channels": lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
    "prune the bias": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
    "parametrization of the bias": lambda layer: parametrize.register_parametrization(layer, "bias", nn.Identity()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "optimizer": lambda layer: torch.optim.SGD([layer.weight], 0.1),
    "optimizer of a frozen layer": lambda layer: torch.optim.Adam([layer.requires_grad_(False).weight]),
    "bias of another shape": lambda layer: setattr(layer, "bias", nn.Parameter(torch.zeros(3))),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("spelling", REFUSED)
def test_every_other_write_is_refused_and_changes_nothing(spelling: str) -> None:
    for layer, place in zip(tuckers(), (r"body\.conv \(FactorizedConv2d\)", "TuckerConv"), strict=True):
        before, names = copied_state(layer), list(layer.state_dict())
        alias = layer.weight
        values = alias.detach().clone()
        with pytest.raises(WeightError, match=rf"^{place}: .* of its stages (stages\.)?0, .*to_conv\(\)"):
            REFUSED[spelling](layer)
        assert has_state(layer, before)
        assert list(layer.state_dict()) == names
        assert alias.equal(values)
        assert layer(torch.zeros(1, 6, 5, 5)).isfinite().all()


def test_an_alias_has_the_values_of_the_layer_after_a_refused_write() -> None:
    layer = chain_module()
    weight = layer.weight
    view = weight.detach().view(8, -1)
    with pytest.raises(WeightError), torch.no_grad():
        view.add_(1)
    assert view.equal(layer.weight.detach().view(8, -1))
    with torch.no_grad():
        view.mul_(2)
    assert weight.equal(layer.weight)


def test_scaled_stages_that_leave_the_range_of_half_precision_are_refused() -> None:
    layer = chain_module(dtype=torch.float16)
    with torch.no_grad():
        list(layer.children())[-1].weight.mul_(2.0**12)
        next(layer.children()).weight.mul_(2.0**-12)
    before = copied_state(layer)
    with pytest.raises(WeightError, match=r"leave the range of torch\.float16"):
        layer.weight.data *= 1000
    assert has_state(layer, before)


def test_a_stage_with_a_computed_weight_is_named() -> None:
    layer = chain_module()
    prune.l1_unstructured(layer.get_submodule("1"), "weight", 0.1)
    with pytest.raises(WeightError, match="its stage 1 computes its weight"):
        layer.weight.data *= 2


def test_numpy_views_are_read_only() -> None:
    weight = chain_module().weight.detach()
    for array in (weight.numpy(), np.asarray(weight)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    weight.clone().numpy()[0] = 0
    weight.double().numpy()[0] = 0


# Parameters


def test_the_freeze_loop_acts_on_the_stages() -> None:
    for layer in tuckers():
        for parameter in (layer.weight, layer.bias):
            parameter.requires_grad_(False)
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        assert not layer.weight.requires_grad
        layer.weight.requires_grad = True
        assert [name for name, p in layer.named_parameters() if not p.requires_grad] == [
            name for name, _ in layer.named_parameters() if name.endswith("bias")
        ]


def test_gradients_are_cleared_on_the_stages() -> None:
    layer = chain_module()
    layer(torch.randn(1, 6, 5, 5)).sum().backward()
    layer.weight.grad = None
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"2.bias"}


def test_a_new_parameter_gives_the_stages_its_dtype_and_requires_grad() -> None:
    layer, x = chain_module(), torch.randn(1, 6, 5, 5)
    expected = F.conv2d(x, layer.weight * 2, layer.bias, padding=1)
    before = dict(layer.named_parameters())
    layer.weight = nn.Parameter((layer.weight * 2).double(), requires_grad=False)
    layer.bias = nn.Parameter(layer.bias.double())
    assert apart(expected, layer(x.double())) < 1e-6
    after = dict(layer.named_parameters())
    assert all(after[name] is not before[name] for name in before)
    assert {p.dtype for p in after.values()} == {torch.float64}
    assert [name for name, p in after.items() if p.requires_grad] == ["2.bias"]


def test_data_of_another_dtype_keeps_the_parameters() -> None:
    layer = chain_module()
    before = dict(layer.named_parameters())
    weight = layer.weight
    weight.data = weight.data.double()
    assert weight.dtype == layer.weight.dtype == torch.float64
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())


def test_memory_format_of_the_stages_is_kept() -> None:
    layer = chain_module().to(memory_format=torch.channels_last)
    formats = [p.stride() for p in layer.parameters()]
    layer.weight.data *= 2
    layer.weight = nn.Parameter(layer.weight * 2)
    assert [p.stride() for p in layer.parameters()] == formats
    assert layer.to_conv().weight.is_contiguous(memory_format=torch.channels_last)


# Biases


@pytest.mark.parametrize("name", ["plain", "dilated", "transposed", "transposed 3-D", "1-D circular"])
def test_a_bias_is_set_added_and_removed(name: str) -> None:
    spec = SPECS[name]
    layer = chain_module(spec)
    x = random_input(spec, torch.float32)
    plain = run(layer, layer.weight, x) - (0 if layer.bias is None else layer.bias.view(-1, *[1] * spec.order))
    new = torch.randn(spec.out_channels)
    ways: list[Callable[[], None]] = [
        lambda: setattr(layer, "bias", nn.Parameter(new)),
        lambda: setattr(layer.bias, "data", new + 0),
        lambda: setattr(layer, "bias", None),
        lambda: layer.register_parameter("bias", nn.Parameter(new)),
        lambda: setattr(layer, "bias", None),
        lambda: setattr(layer, "bias", new),
    ]
    for way in ways:
        way()
        added = 0 if layer.bias is None else new.view(-1, *[1] * spec.order)
        assert apart(plain + added, layer(x)) < 1e-5
        assert (layer._dense.bias, layer._specs[-1].bias) == (layer.bias is not None,) * 2
        twin = copy.deepcopy(layer)
        assert twin(x).equal(layer(x))


def test_the_bias_of_a_layer_to_build_with_is_set_and_removed() -> None:
    layer, x = CPConv(4, 6, 3, order=2, rank=3, bias=False), torch.randn(1, 4, 5, 5)
    plain = layer(x)
    layer.bias = nn.Parameter(torch.arange(6.0))
    torch.testing.assert_close(layer(x), plain + torch.arange(6.0).view(6, 1, 1))
    assert layer.to_conv().bias.equal(layer.bias)
    assert layer.spec.bias
    layer.bias = None
    assert layer(x).equal(plain)
    with pytest.raises(TypeError, match="cannot assign 'str'"):
        layer.bias = "no"


# Reading


def test_results_of_operations_are_plain_tensors_with_gradients_to_the_stages() -> None:
    layer = chain_module()
    weight = layer.weight
    for result in (weight * 2, weight.clone(), weight.sum(), weight.double(), F.pad(weight, (1, 1)), weight @ weight):
        assert type(result) is Tensor
    (weight.square().sum() + F.conv2d(torch.randn(1, 6, 5, 5), weight).sum()).backward()
    assert {name for name, p in layer.named_parameters() if p.grad is None} == {"2.bias"}
    assert (weight.shape, weight.dtype, weight.device.type) == ((8, 6, 3, 3), torch.float32, "cpu")
    assert "weight" in layer._parameters
    assert layer._parameters["weight"].equal(weight)
    assert list(layer._parameters) == []


def test_an_independent_copy_can_be_made_and_changed() -> None:
    layer = chain_module()
    before = copied_state(layer)
    parameter = nn.Parameter(layer.weight)
    assert type(parameter) is nn.Parameter
    assert parameter.requires_grad
    assert parameter.is_leaf
    dense = nn.Conv2d(6, 8, 3, padding=1)
    dense.weight = parameter
    torch.optim.SGD(dense.parameters(), 0.1)
    twins = (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight)), layer.weight.clone())
    with torch.no_grad():
        for twin in (parameter, *twins):
            assert twin.equal(layer.weight)
            assert "Composed" not in type(twin).__name__
            twin.add_(1)
    assert has_state(layer, before)


def test_weight_is_read_in_full_precision_under_autocast_like_a_parameter() -> None:
    layer = chain_module()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.weight.dtype == torch.float32
        assert layer.weight.equal(layer.weight)
        layer.weight.data.mul_(2)


class Reading(nn.Module):
    """Also uses the weight of its convolution."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.conv.weight
        return self.conv(x.to(weight.dtype)) + F.conv2d(x, weight, padding=1) * weight.shape[0]


def test_weight_is_read_by_graphs_and_transforms() -> None:
    for layer in tuckers():
        model, x = Reading(layer), torch.randn(2, 6, 7, 7)
        expected = model(x)
        graphs = [torch.fx.symbolic_trace(model), torch.fx.experimental.proxy_tensor.make_fx(model)(x)]
        for other in (*graphs, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert apart(expected, other(x)) < 1e-6
        parameters = dict(model.named_parameters())
        gradients = torch.func.grad(lambda p, m=model, x=x: torch.func.functional_call(m, p, (x,)).sum())(parameters)
        expected.sum().backward()
        assert all(apart(p.grad, gradients[name]) < 1e-5 for name, p in parameters.items() if p.grad is not None)
        assert len(gradients) == len(parameters)


@pytest.mark.integration
@pytest.mark.parametrize("number", [0, 1])
def test_weight_is_read_by_compiled_exported_and_scripted_models(number: int) -> None:
    model, x = Reading(tuckers()[number]), torch.randn(2, 6, 7, 7)
    for other in (
        torch.export.export(model, (x,)).module(),
        torch.export.export(model, (x,), strict=True).module(),
        torch.jit.trace(model, (x,)),
        torch.compile(model, backend="aot_eager", fullgraph=True),
    ):
        assert apart(model(x), other(x)) < 1e-6
    compiled: Any = torch.compile(model.conv, backend="eager", fullgraph=True)
    assert apart(model.conv(x), compiled(x)) < 1e-6


def test_copied_and_pickled_layers_write_to_their_own_stages() -> None:
    for layer in tuckers():
        before = copied_state(layer)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            wanted = layer.weight * 2
            twin.weight.data *= 2
            torch.testing.assert_close(twin.weight, wanted)
            with pytest.raises(WeightError):
                nn.utils.parametrizations.weight_norm(twin)
        assert has_state(layer, before)


def test_layers_are_written_to_by_several_threads() -> None:
    layers = [chain_module() for _ in range(8)]
    wanted = layers[0].weight * 8

    def scale(layer: Any) -> None:
        for _ in range(3):
            layer.weight.data.mul_(2)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(scale, layers))
    assert all(apart(wanted, layer.weight) < 1e-6 for layer in layers)


# Tied, nested and dense layers


def tied_pair() -> tuple[Any, Any]:
    one, two = chain_module(), chain_module()
    for first, second in zip(one.children(), two.children(), strict=True):
        second.weight = first.weight
    return one, two


def test_tied_layers_share_a_write_in_place_once() -> None:
    one, two = tied_pair()
    wanted = one.weight * 2
    one.weight.data *= 2
    assert one.weight.equal(two.weight)
    torch.testing.assert_close(two.weight, wanted)


def test_a_new_parameter_unties_a_layer_as_it_does_a_convolution() -> None:
    one, two = tied_pair()
    kept = two.weight.clone()
    one.weight = nn.Parameter(one.weight * 2)
    assert two.weight.equal(kept)
    torch.testing.assert_close(one.weight, 2 * kept)
    assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}


def test_a_stage_that_was_factorized_again_is_written_to() -> None:
    layer = chain_module(ConvSpec.parse(6, 8, (3, 3), padding=1, bias=True))
    inner: Any = layer.get_submodule("2")
    specs = (ConvSpec.parse(inner.in_channels, 8, (1, 1)), ConvSpec.parse(8, 8, (1, 1), bias=True))
    weights = [inner.weight.detach().clone(), torch.eye(8).view(8, 8, 1, 1)]
    bias = inner.bias.detach().clone()
    stages = write_chain(specs, weights, bias, like=inner.weight)
    factorize_module(inner, layer._specs[-1], specs, stages)
    wanted = layer.weight * torch.arange(8.0).view(8, 1, 1, 1)
    layer.weight = nn.Parameter(wanted)
    torch.testing.assert_close(layer.weight, wanted)
    wanted = layer.weight * 3
    layer.weight.data *= 3
    torch.testing.assert_close(layer.weight, wanted)
    layer.weight.requires_grad_(False)
    assert not any(p.requires_grad for name, p in layer.named_parameters() if name.endswith("weight"))


def test_a_chain_of_one_stage_takes_any_write() -> None:
    module: Any = nn.Conv2d(4, 6, 3)
    spec = ConvSpec.parse(4, 6, (3, 3), bias=True)
    factorize_module(module, spec, [spec], write_conv(spec, module.weight, module.bias))
    module.weight.data += 1
    with torch.no_grad():
        module.weight.clamp_(0, 1)
    assert 0 <= float(module.weight.min()) <= float(module.weight.max()) <= 1
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(module(x), F.conv2d(x, module.weight, module.bias))


class Padded(nn.Conv2d):
    """Pads by a module of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pad = nn.ZeroPad2d((1, 1, 1, 1))
        self.register_buffer("shift", torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(self.pad(input), self.weight, self.bias) + self.shift


@pytest.mark.parametrize("name", ["plain", "dilated", "groups", "1-D", "3-D", "transposed, grouped, dilated"])
def test_to_conv_returns_the_convolution_that_was_replaced(name: str) -> None:
    spec = SPECS[name]
    layer = chain_module(spec).eval()
    layer.weight.requires_grad_(False)
    conv = layer.to_conv()
    fresh = write_conv(spec, random_layer(spec, torch.float32).weight, layer.bias)[0]
    assert type(conv) is type(fresh)
    assert vars(conv).keys() == vars(fresh).keys()
    assert conv.state_dict().keys() == fresh.state_dict().keys()
    assert not conv.training
    x = random_input(spec, torch.float32)
    assert apart(layer(x), conv(x)) < 1e-5
    assert not conv.weight.requires_grad
    before = copied_state(layer)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.add_(1)
    assert has_state(layer, before)


def test_to_conv_keeps_the_class_and_what_it_holds() -> None:
    module: Any = Padded(6, 8, 3)
    parts = chain_module(ConvSpec.parse(6, 8, (3, 3), bias=True))
    factorize_module(module, parts._dense, parts._specs, list(parts.children()))
    conv: Any = module.to_conv()
    assert type(conv) is Padded
    assert set(conv.state_dict()) == {"weight", "bias", "shift"}
    x = torch.randn(1, 6, 5, 5)
    assert apart(module(x), conv(x)) < 1e-5
    module.weight = nn.Parameter(module.weight * 2)
    assert apart(2 * (conv(x) - conv.bias.view(8, 1, 1) - 1), module(x) - module.bias.view(8, 1, 1) - 1) < 1e-5


def test_attributes_that_follow_from_the_stages_cannot_be_set() -> None:
    layer = chain_module()
    for name in ("stride", "padding", "groups"):
        with pytest.raises(ArgumentError, match=rf"{name} of a factorized convolution.* its stages 0, 1"):
            setattr(layer, name, getattr(layer, name))


def test_transposed_layers_to_build_with_have_their_kernel_in_the_layout_of_all_convolutions() -> None:
    layer = FactorizedConv.from_conv(nn.ConvTranspose2d(6, 8, 3, stride=2), 0.5, factorization="tucker")
    x = torch.randn(1, 6, 5, 5)
    plain = layer(x) - layer.bias.view(8, 1, 1)
    layer.weight.data *= torch.arange(8.0).view(8, 1, 1, 1)
    torch.testing.assert_close(layer(x) - layer.bias.view(8, 1, 1), plain * torch.arange(8.0).view(8, 1, 1))
