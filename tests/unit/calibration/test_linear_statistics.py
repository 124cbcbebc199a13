"""Statistics of linear layers: the moments of their inputs and output gradients, however they are spelled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxfact
from fxfact.calibration import moments, row_sketch
from fxfact.conv import KroneckerFisher, LowRankMoment
from tests.support import apart

SAMPLES, TOKENS = 12, 5
Spelling = Callable[[Tensor, "Net"], Tensor]
SPELLINGS: dict[str, Spelling] = {
    "module": lambda x, net: net.middle(x),
    "function": lambda x, net: F.linear(x, net.weight, net.bias),
    "transposed": lambda x, net: x @ net.weight.T + net.bias,
    "matrix": lambda x, net: x.matmul(net.matrix) + net.bias,
    "addmm": lambda x, net: torch.addmm(net.bias, x.flatten(0, 1), net.weight.t()).unflatten(0, (-1, TOKENS)),
}


class Net(nn.Module):
    """Three linear layers around nonlinear functions. The middle one is spelled in several ways."""

    def __init__(self, spelling: Spelling, inputs: int = 6, outputs: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, inputs)
        middle = nn.Linear(inputs, outputs)
        self.last = nn.Linear(outputs, 3)
        self.spelling = spelling
        if spelling is SPELLINGS["module"]:
            self.middle = middle
        else:
            self.bias = nn.Parameter(middle.bias.detach())
        if spelling is SPELLINGS["matrix"]:
            self.matrix = nn.Parameter(middle.weight.detach().T.clone())
        elif spelling is not SPELLINGS["module"]:
            self.weight = nn.Parameter(middle.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.spelling(torch.tanh(self.first(x)), self)).mean(1))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(SAMPLES, TOKENS, 4, generator=torch.Generator().manual_seed(3))


def middle_of(statistics: fxfact.Statistics) -> KroneckerFisher:
    (found,) = (metric for path, metric in statistics.moments.items() if path not in ("first", "last"))
    return found


def calibrated(net: nn.Module, tokens: Tensor, **options: Any) -> fxfact.Statistics:
    return fxfact.calibrate(net.eval(), tokens.split(5), **options)


def test_moments_of_a_linear_layer_are_those_of_its_inputs_and_output_gradients(tokens: Tensor) -> None:
    net = Net(SPELLINGS["module"]).eval()
    statistics = fxfact.calibrate(net, [tokens], likelihood=lambda output: output.square().sum())
    captured: dict[str, Tensor] = {}

    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        captured["input"] = args[0].detach()
        output.register_hook(lambda gradient: captured.update(gradient=gradient))

    net.middle.register_forward_hook(record)
    net(tokens).square().sum().backward()
    rows, gradients = (captured[name].flatten(0, 1) for name in ("input", "gradient"))
    assert apart(rows.T @ rows / len(rows), statistics.moments["middle"].input.factors[0][0]) < 1e-5
    assert apart(gradients.T @ gradients / SAMPLES, statistics.moments["middle"].output.factors[0][0]) < 1e-5
    assert all(parameter.grad is None for name, parameter in net.named_parameters() if "middle" not in name) is False


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name != "module"])
@pytest.mark.parametrize("exported", [None, "default", "decomposed"])
def test_every_spelling_has_the_same_statistics(spelling: str, exported: str | None, tokens: Tensor) -> None:
    expected = middle_of(calibrated(Net(SPELLINGS["module"]), tokens))
    net: Any = Net(SPELLINGS[spelling]).eval()
    if exported is None:
        found = middle_of(calibrated(net, tokens))
    else:
        batch = torch.export.Dim("batch")
        program = torch.export.export(net, (tokens[:5],), dynamic_shapes=({0: batch},))
        program = program.run_decompositions() if exported == "decomposed" else program
        found = middle_of(fxfact.calibrate(program, tokens.split(5)))
    assert apart(expected.input.factors[0], found.input.factors[0]) < 1e-5
    assert apart(expected.output.factors[0], found.output.factors[0]) < 1e-5


def test_checkpoints_and_autocast_do_not_matter(tokens: Tensor) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    class Autocast(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x).float()

    expected = middle_of(calibrated(Net(SPELLINGS["module"]), tokens))
    for kind, tolerance in ((Checkpointed, 1e-5), (Autocast, 0.05)):
        found = middle_of(calibrated(kind(SPELLINGS["module"]), tokens))
        assert apart(expected.input.factors[0], found.input.factors[0]) < tolerance
        assert apart(expected.output.factors[0], found.output.factors[0]) < tolerance


@pytest.mark.parametrize("leading", [(), (TOKENS,), (3, TOKENS), (TOKENS, 1)])
def test_any_number_of_axes_may_lead(leading: tuple[int, ...]) -> None:
    class Leading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x))).flatten(1)

    x = torch.randn(SAMPLES, *leading, 4, generator=torch.Generator().manual_seed(1))
    net = Leading().eval()
    statistics = fxfact.calibrate(net, x.split(4), likelihood="gaussian")
    rows = x.flatten(0, -2)
    assert apart(rows.T @ rows / len(rows), statistics.moments["first"].input.factors[0][0]) < 1e-5
    assert torch.allclose(
        statistics.moments["last"].output.factors[0][0].diagonal(),
        fxfact.calibrate(net, [x], likelihood="gaussian").moments["last"].output.factors[0][0].diagonal(),
        rtol=1e-4,
    )


def test_rows_that_belong_to_no_sample_are_taken_as_well(tokens: Tensor) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            packed = torch.tanh(self.first(x.flatten(0, 1)[1:]))  # one row fewer than the samples have
            return self.last(F.pad(packed, (0, 0, 1, 0)).reshape(*x.shape[:2], -1).mean(1))

    statistics = fxfact.calibrate(Packed().eval(), [tokens], capture="modules")
    rows = tokens.flatten(0, 1)[1:]
    assert apart(rows.T @ rows / len(rows), statistics.moments["first"].input.factors[0][0]) < 1e-5


@pytest.mark.parametrize("sizes", [(40, 8), (6, 40), (40, 40)])
def test_wide_layers_are_held_by_their_rows_with_the_same_result(
    sizes: tuple[int, int], tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net(SPELLINGS["module"], *sizes)
    dense = calibrated(net, tokens)
    monkeypatch.setattr(moments, "MAX_DENSE_SIZE", 20)
    by_rows = calibrated(net, tokens)
    assert [isinstance(m, LowRankMoment) for m in (middle_of(by_rows).input, middle_of(by_rows).output)] == [
        size > 20 for size in sizes
    ]
    by_rows.save(tmp_path / "rows.npz")
    loaded = fxfact.Statistics.load(tmp_path / "rows.npz")
    assert loaded.digest("middle") == by_rows.digest("middle")
    options: dict[str, Any] = {"budget": fxfact.Params(0.6), "example_inputs": tokens[:1]}
    expected = fxfact.factorize(net, calibration=dense, **options)
    for statistics in (by_rows, loaded):
        found = fxfact.factorize(net, calibration=statistics, **options)
        assert [d.rewrite for d in fxfact.plan_of(found).rewrites] == [
            d.rewrite for d in fxfact.plan_of(expected).rewrites
        ]
        assert apart(expected(tokens), found(tokens)) < 1e-3


def test_a_wide_layer_with_many_rows_is_approximated(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(SPELLINGS["module"], 40, 40)
    exact = middle_of(calibrated(net, tokens))
    monkeypatch.setattr(moments, "MAX_DENSE_SIZE", 20)
    monkeypatch.setattr(row_sketch, "MAX_ROWS", 32)
    found = middle_of(calibrated(net, tokens))
    assert found.input.rows.shape == (32, 40)  # type: ignore[attr-defined]
    trace = float(exact.input.factors[0][0].trace())
    assert float(found.input.factors[0][0].trace()) == pytest.approx(trace, rel=0.2)


def test_layers_that_no_gradient_reaches_stay_dense(tokens: Tensor) -> None:
    class Detached(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))).mean(1) + self.middle.bias.detach())

    net = Detached(SPELLINGS["module"]).eval()
    net.register_module("unused", nn.Linear(4, 4))
    plan = fxfact.plan(net, budget=fxfact.Params(0.8), calibration=[tokens], example_inputs=tokens[:1])
    assert plan["unused"].reason == "forward does not call it"
