"""A linear layer is factorized in every spelling, on every front end, with any number of leading axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import fxfact
from fxfact.conv import FactorizedModule
from fxfact.utils import alias_copy
from tests.linear_spellings import FUNCTIONS, MODULES, Net
from tests.support import apart, copied_state, has_state, params_of

SIZES = {"narrow": (12, 5), "wide": (5, 12), "square": (8, 8)}
LEADING = {"one axis": (6,), "tokens": (6, 7), "maps": (6, 3, 2)}


DECOMPOSED_BY_DEFAULT = ("Linear", "F.linear", "matmul")


def cases() -> Iterator[Any]:
    """Spellings, front ends and sizes. Exports take long: by default they have one size, and few are decomposed."""
    for kind, spellings in (("modules", MODULES), ("functions", FUNCTIONS)):
        for name in spellings:
            for front_end in ("trace", "export", "decomposed", *(("modules",) if kind == "modules" else ())):
                for size in SIZES:
                    is_slow = front_end in ("export", "decomposed") and size != "narrow"
                    is_slow |= front_end == "decomposed" and name not in DECOMPOSED_BY_DEFAULT
                    marks = [pytest.mark.integration] if is_slow else []
                    yield pytest.param(spellings[name], front_end, size, id=f"{name}, {front_end}, {size}", marks=marks)


def captured_as(front_end: str, net: nn.Module, x: Tensor) -> tuple[Any, dict[str, Any]]:
    if front_end in ("trace", "modules"):
        return net, {"capture": front_end, "example_inputs": x}
    program = torch.export.export(net, (x,))
    return (program.run_decompositions() if front_end == "decomposed" else program), {}


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize(("make", "front_end", "size"), cases())
def test_a_linear_layer_is_factorized_in_every_spelling(
    make: Callable[[int, int], nn.Module], front_end: str, size: str
) -> None:
    inputs, outputs = SIZES[size]
    for leading in LEADING.values():
        if make is FUNCTIONS["non-contiguous"] and len(leading) == 1:
            continue
        torch.manual_seed(0)
        net = Net(make(inputs, outputs), inputs, outputs).eval()
        x = torch.randn(*leading, 4)
        before = copied_state(net)
        model, options = captured_as(front_end, net, x)
        small = fxfact.factorize(model, "svd", rank=2, include="layer*", verify=True, allow_growth=True, **options)
        plan = fxfact.plan_of(small)
        (decision,) = plan.rewrites
        assert str(decision.spec) == f"Linear({inputs}→{outputs})"
        positions = x[..., 0].numel() // leading[0]
        assert decision.before.macs == positions * inputs * outputs
        assert decision.after.macs == positions * 2 * (inputs + outputs)
        assert plan.network.macs == positions * (4 * inputs + inputs * outputs + 3 * outputs)
        assert plan.after.params == (sum(map(torch.numel, small.parameters())))
        assert has_state(net, before)
        full = min(inputs, outputs)
        same = fxfact.factorize(model, "svd", rank=full, include="layer*", allow_growth=True, **options)
        call = same.module() if front_end in ("export", "decomposed") else same
        assert apart(net(x), call(x)) < 1e-5


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_factorized_module_becomes_the_linear_layer_again(make: Callable[[int, int], nn.Module]) -> None:
    torch.manual_seed(0)
    net, x = Net(make(6, 8), 6, 8).eval(), torch.randn(5, 3, 4)
    small = fxfact.factorize(net, "svd", rank=3, example_inputs=x, capture="modules", allow_growth=True)
    assert isinstance(small.layer, FactorizedModule)
    assert isinstance(small.layer, type(net.layer) if make is not NonDynamicallyQuantizableLinear else nn.Linear)
    assert small.layer.weight.shape == net.layer.weight.shape
    expected = small(x)
    dense = alias_copy(small)
    dense.layer = small.layer.to_linear()
    assert params_of([dense.layer]) == params_of([net.layer])
    assert apart(expected, dense(x)) < 1e-5
    with torch.no_grad():
        small.layer.weight.mul_(2)
    assert apart(2 * dense.layer.weight, small.layer.weight) < 1e-5


@pytest.mark.parametrize("front_end", ["trace", "modules", "export"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_data_types_and_training_modes_are_kept(front_end: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x = Net(nn.Linear(16, 16), 16, 16).to(dtype).eval(), torch.randn(5, 3, 4).to(dtype)
    model, options = captured_as(front_end, net, x)
    small: Any = fxfact.factorize(model, "svd", rank=4, allow_growth=True, **options)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    assert fxfact.verify(model, small, x).ok
    if front_end != "export":
        net.layer.weight.requires_grad_(False)
        again = fxfact.factorize(net.train(), "svd", rank=4, allow_growth=True, **options)
        assert again.training
        assert [p.requires_grad for name, p in again.named_parameters() if name.startswith("layer.")].count(False) == 2
