"""Random convolutions, factorizations, ranks, dtypes and inputs.

There are 150 by default, 2,000 with ``pytest -m integration``, and 50,000 with ``pytest -m fuzz``.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxfact
from fxfact.conv import ConvChain, ConvLayer, ConvSpec, compose, run, write_conv
from fxfact.factorizations import Factorization, Rank, SpatialSVD, Tucker
from tests.support import ALL, quick

SEED = 20261123
METHODS = [*map(quick, ALL), Tucker(keep_full_sides=True, sweeps=1), SpatialSVD(last_axes_first=True)]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-9, torch.float16: 1e-9}  # half runs in double
warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")


def examples(count: int) -> Any:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=count, deadline=None, database=None, suppress_health_check=quiet)


@st.composite
def specs(draw: st.DrawFn) -> ConvSpec:
    order = draw(st.integers(1, 3))
    per_axis = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(order))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 4]))
    kernel, stride, dilation = per_axis(1, 5 - order), per_axis(1, 3), per_axis(1, 3)
    transposed = draw(st.booleans())
    before = per_axis(0, 3)
    after = before if transposed or draw(st.booleans()) else per_axis(0, 3)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    return ConvSpec(
        in_channels=groups * draw(st.integers(1, 5)),
        out_channels=groups * draw(st.integers(1, 5)),
        kernel_size=kernel,
        stride=stride,
        padding=tuple(zip(before, after, strict=True)),
        dilation=dilation,
        groups=groups,
        padding_mode="zeros" if transposed else draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        transposed=transposed,
        output_padding=extra if transposed else (),
        bias=draw(st.booleans()),
    )


@st.composite
def sizes_for(draw: st.DrawFn, spec: ConvSpec) -> tuple[int, ...]:
    """Draw a spatial size: the smallest that the convolution accepts, or a little more."""
    found = []
    for axis in range(spec.order):
        least = max(1, *spec.padding[axis]) + (spec.padding_mode == "reflect")
        while True:
            probe = [least if a == axis else 9 for a in range(spec.order)]
            if spec.output_size(tuple(probe))[axis] >= 1:
                break
            least += 1
        found.append(least + draw(st.integers(0, 3)))
    return tuple(found)


@st.composite
def cases(draw: st.DrawFn) -> tuple[ConvLayer, Factorization, Rank, Tensor]:
    """Draw a convolution, a factorization that accepts it, any feasible rank, and an input."""
    spec = draw(specs())
    methods = [method for method in METHODS if not method.rejects(spec)]
    if not methods:
        spec = ConvSpec.parse(spec.in_channels, 2 * spec.out_channels, (3, 2), groups=spec.groups, padding=1)
        methods = [method for method in METHODS if not method.rejects(spec)]
    method = draw(st.sampled_from(methods))
    rank = method.clip(spec, tuple(draw(st.integers(1, most)) for most in method.max_rank(spec)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1.0, 1.0, 1.0, 1e-3, 30.0, 0.0]))
    weight = torch.randn(spec.weight_shape, generator=random, dtype=torch.float64) * scale
    bias = torch.randn(spec.out_channels, generator=random, dtype=torch.float64).to(dtype) if spec.bias else None
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    x = torch.randn(*batch, spec.in_channels, *draw(sizes_for(spec)), generator=random, dtype=torch.float64)
    return ConvLayer(spec, weight.to(dtype), bias), method, rank, x.to(dtype)


def wide(chain: ConvChain) -> ConvChain:
    """Return the chain in double precision if it is in half precision, which not every CPU convolution supports."""
    return ConvChain(tuple(ConvLayer(s.spec, at_least_single(s.weight), at_least_single(s.bias)) for s in chain.layers))


def at_least_single(tensor: Any) -> Any:
    return tensor.double() if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def close(expected: Tensor, found: Tensor, dtype: torch.dtype, scale: Tensor) -> bool:
    """Return whether they are equal up to rounding errors of the size of the largest sum, ``scale``."""
    assert expected.shape == found.shape
    return bool((found - expected).abs().max() <= TOLERANCE[dtype] * (1 + scale.abs().max()))


def magnitude(chain: ConvChain, x: Tensor) -> Tensor:
    """Return the output of the chain if no terms of its sums cancelled."""
    layers = [ConvLayer(s.spec, s.weight.abs(), None if s.bias is None else s.bias.abs()) for s in chain.layers]
    return run(ConvChain(tuple(layers)), x.abs())


def check_laws(case: tuple[ConvLayer, Factorization, Rank, Tensor]) -> None:
    layer, method, rank, x = case
    chain = method.decompose(layer, rank)
    assert chain.specs == method.layout(layer.spec, rank)
    assert all(bool(torch.isfinite(stage.weight).all()) for stage in chain.layers)
    assert {stage.weight.dtype for stage in chain.layers} == {layer.weight.dtype}
    sizes = tuple(x.shape[-layer.spec.order :])
    assert chain.output_size(sizes) == layer.spec.output_size(sizes)
    dtype, chain, x = x.dtype, wide(chain), at_least_single(x)
    found = run(chain, x)
    assert found.shape[-layer.spec.order :] == layer.spec.output_size(sizes)
    dense = run(ConvLayer(layer.spec, compose(chain), chain.bias), x)
    assert close(dense, found, dtype, magnitude(chain, x))


def check_agreement(case: tuple[ConvLayer, Factorization, Rank, Tensor]) -> None:
    """Check that the chain, the rewritten graph and the swapped modules compute the same."""
    layer, method, rank, x = case
    if x.dtype in (torch.bfloat16, torch.float16):
        x, layer = x.double(), ConvLayer(layer.spec, layer.weight.double(), at_least_single(layer.bias))
    model = nn.Sequential(*write_conv(layer.spec, layer.weight, layer.bias)).eval()
    chain = method.decompose(layer, rank)
    expected, scale = run(chain, x), magnitude(chain, x)
    for capture in ("trace", "modules"):
        options: dict[str, Any] = {"rank": rank, "allow_growth": True, "example_inputs": x, "capture": capture}
        result = fxfact.factorize(model, method, **options)
        plan = fxfact.plan_of(result)
        with torch.no_grad():
            if plan.rewrites:
                assert close(expected, result(x), x.dtype, scale)
                assert sum(p.numel() for p in result.parameters()) == plan.after.params == chain.params
                assert fxfact.verify(model, result, x).graph <= TOLERANCE[x.dtype] * (1 + float(scale.abs().max()))
            else:
                assert len(chain.layers) == 1


@seed(SEED)
@examples(120)
@given(case=cases())
def test_chain_equals_its_composed_kernel(case: tuple[ConvLayer, Factorization, Rank, Tensor]) -> None:
    check_laws(case)


@seed(SEED)
@examples(30)
@given(case=cases())
def test_chain_graph_and_modules_agree(case: tuple[ConvLayer, Factorization, Rank, Tensor]) -> None:
    check_agreement(case)


@pytest.mark.integration
@seed(SEED)
@examples(1600)
@given(case=cases())
def test_chain_equals_its_composed_kernel_in_many_cases(case: tuple[ConvLayer, Factorization, Rank, Tensor]) -> None:
    check_laws(case)


@pytest.mark.integration
@seed(SEED)
@examples(400)
@given(case=cases())
def test_chain_graph_and_modules_agree_in_many_cases(case: tuple[ConvLayer, Factorization, Rank, Tensor]) -> None:
    check_agreement(case)


@pytest.mark.fuzz
@seed(SEED)
@examples(44_000)
@given(case=cases())
def test_chain_equals_its_composed_kernel_in_all_cases(case: tuple[ConvLayer, Factorization, Rank, Tensor]) -> None:
    check_laws(case)


@pytest.mark.fuzz
@seed(SEED)
@examples(6_000)
@given(case=cases())
def test_chain_graph_and_modules_agree_in_all_cases(case: tuple[ConvLayer, Factorization, Rank, Tensor]) -> None:
    check_agreement(case)
