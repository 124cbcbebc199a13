"""Random linear layers: spellings, sizes, leading axes, strides, data types, ranks and front ends.

There are 40 by default, 800 with ``pytest -m integration``, and 20,000 with ``pytest -m fuzz``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxfact
from tests.linear_spellings import FUNCTIONS, MODULES, Net

SEED = 20261130
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
NEEDS_TWO_AXES = "non-contiguous"


def examples(count: int) -> Any:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=count, deadline=None, database=None, suppress_health_check=quiet)


@dataclass(frozen=True, eq=False)
class Case:
    """A network around one linear layer, an input, a front end and a rank."""

    spelling: str
    net: nn.Module
    x: Tensor
    capture: str
    rank: int


@st.composite
def cases(draw: st.DrawFn, exported: bool) -> Case:
    inputs, outputs = draw(st.integers(2, 12)), draw(st.integers(2, 12))
    leading = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    captures = ["export", "decomposed"] if exported else ["trace", "modules"]
    capture = draw(st.sampled_from(captures))
    names = [*MODULES] if capture == "modules" else [*MODULES, *FUNCTIONS]
    spelling = draw(st.sampled_from([name for name in names if name != NEEDS_TWO_AXES or len(leading) > 1]))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    layer = {**MODULES, **FUNCTIONS}[spelling](inputs, outputs)
    if spelling in MODULES and draw(st.booleans()):  # a weight that is not contiguous
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    net = Net(layer, inputs, outputs).to(dtype)
    x = torch.randn(*leading, 4).to(dtype)
    if len(leading) > 1 and draw(st.booleans()):
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    return Case(spelling, net.eval(), x, capture, draw(st.integers(1, min(inputs, outputs))))


def check(case: Case) -> None:
    """Check costs and outputs against the same product by hand."""
    model: Any = case.net
    options: dict[str, Any] = {"example_inputs": case.x, "capture": case.capture}
    if case.capture in ("export", "decomposed"):
        model = torch.export.export(case.net, (case.x,))
        model, options = (model.run_decompositions() if case.capture == "decomposed" else model), {}
    small = fxfact.factorize(model, "svd", rank=case.rank, include="layer*", allow_growth=True, **options)
    (decision,) = fxfact.plan_of(small).rewrites
    assert decision.spec is not None
    rows = case.x[..., 0].numel()
    samples = len(case.x) if case.x.ndim > 1 else 1
    assert decision.before.macs == rows // samples * decision.spec.in_channels * decision.spec.out_channels
    verified = fxfact.verify(model, small, case.x)
    assert verified.graph <= TOLERANCE[case.x.dtype], (case.spelling, case.capture, verified)
    if case.rank == min(decision.spec.in_channels, decision.spec.out_channels):
        assert verified.end_to_end <= 10 * TOLERANCE[case.x.dtype]


@seed(SEED)
@examples(40)
@given(case=cases(exported=False))
def test_a_linear_layer_is_right_in_any_spelling(case: Case) -> None:
    check(case)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize("exported", [False, True])
@seed(SEED)
@examples(400)
@given(data=st.data())
def test_a_linear_layer_is_right_in_many_cases(exported: bool, data: st.DataObject) -> None:
    check(data.draw(cases(exported=exported)))


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize("exported", [False, True])
@seed(SEED)
@examples(10_000)
@given(data=st.data())
def test_a_linear_layer_is_right_in_all_cases(exported: bool, data: st.DataObject) -> None:
    check(data.draw(cases(exported=exported)))
