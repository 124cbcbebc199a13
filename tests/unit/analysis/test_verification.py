from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

import fxfact
from fxfact.analysis.report_data import format_approximation_error
from fxfact.calibration import DivergenceEvaluator
from fxfact.conv import read_conv, run
from fxfact.errors import ArgumentError, ArgumentTypeError, CaptureError, PlanError
from fxfact.factorizations import SVD, Tucker
from tests.support import Branching, Small, apart, with_composed_kernels


@pytest.mark.parametrize("kind", [Small, Branching])
def test_verify_gives_errors_by_site_and_end_to_end(kind: type[Small], image: Tensor) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    result = fxfact.factorize(model, rank=0.5, example_inputs=image)
    verified = fxfact.verify(model, result, image)
    assert verified.ok
    assert verified.graph < 1e-5
    assert verified.tolerance == 1e-4
    assert verified.end_to_end == pytest.approx(apart(model(image), result(image)), rel=1e-3)
    plan = fxfact.plan_of(result)
    known = {row.path: row.relative_error for row in fxfact.inspect(result).rows if row.path != "head"}
    assert {site.path: site.weight for site in verified.sites} == pytest.approx(known, rel=1e-4)
    seen: list[Tensor] = []
    chain = Tucker().decompose(read_conv(model.second), plan["second"].rank)
    model.second.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(image)
    assert verified.sites[1].output == pytest.approx(apart(model.second(seen[0]), run(chain, seen[0])), rel=1e-3)
    text = str(verified)
    assert "second" in text
    assert "graph check passed: on these inputs" in text


def test_verify_and_report_measure_the_loss_as_the_plan_reads_the_outputs(small: Small, image: Tensor) -> None:
    batches = torch.randn(32, *image.shape[1:], generator=torch.Generator().manual_seed(0))
    result = fxfact.factorize(small, "tucker", rank=0.3, example_inputs=image, calibration=batches.split(8))
    evaluator = DivergenceEvaluator(small, [batches], fxfact.plan_of(result).outputs)
    verified = fxfact.verify(small, result, batches)
    assert verified.loss_increase == pytest.approx(evaluator.divergence(result), rel=1e-3)
    assert verified.loss_increase > 0
    assert "loss increase on these inputs:" in str(verified)
    assert fxfact.verify(small, result, batches[:1]).loss_increase is None  # one sample has no variance
    without_data = fxfact.factorize(small, "tucker", rank=0.3, example_inputs=image)
    assert fxfact.verify(small, without_data, batches).loss_increase is None
    report = fxfact.report(small, result, batches)
    assert report.loss_increase == pytest.approx(verified.loss_increase, rel=1e-3)
    assert "loss increase on these inputs:" in str(report)
    assert "loss increase on these inputs" in report.to_html()


@pytest.mark.parametrize("kind", [Small, Branching])
def test_verify_finds_a_wrong_network(kind: type[Small], image: Tensor) -> None:
    model = kind().eval()
    result = fxfact.factorize(model, rank=0.5, example_inputs=image)
    wrong = copy.deepcopy(result)
    wrong.get_submodule("second.1").padding = (0, 0)
    verified = fxfact.verify(model, wrong, image)
    assert not verified.ok
    assert "graph check FAILED: on these inputs" in str(verified)
    trained = copy.deepcopy(result)
    with torch.no_grad():
        trained.get_submodule("first.0").weight.mul_(3)
    assert fxfact.verify(model, trained, image).ok, "its kernels were trained, and it computes with them"
    assert fxfact.verify(model, trained, image).sites[0].weight > 1


def test_reference_is_the_original_with_composed_kernels(small: Small, image: Tensor) -> None:
    result = fxfact.factorize(small, "tt", rank=0.5)
    reference = with_composed_kernels(small, result)
    assert type(reference) is type(small)
    assert apart(reference.eval()(image), result(image)) < 1e-5
    assert apart(small(image), result(image)) > 0.01
    program = export(small, (image,))
    factorized = fxfact.factorize(program, "tt", rank=0.5)
    assert fxfact.verify(program, factorized, image).ok
    assert fxfact.verify(program, factorized) == fxfact.verify(program, factorized, image), "its own inputs"
    assert apart(with_composed_kernels(program, factorized)(image), factorized.module()(image)) < 1e-5


def test_verify_names_the_tensors_that_changed(small: Small, image: Tensor) -> None:
    result = fxfact.factorize(small, rank=0.5, example_inputs=image)
    assert fxfact.verify(small, result, image).changed == ()
    with torch.no_grad():
        result.head.bias.add_(1)
    verified = fxfact.verify(small, result, image)
    assert (verified.ok, verified.changed) == (True, ("head.bias",))
    assert "for this check taken from the factorized network: head.bias" in str(verified)


def test_verify_refuses_what_it_cannot_compare(small: Small, image: Tensor) -> None:
    result = fxfact.factorize(small)
    with pytest.raises(ArgumentError, match="pass example_inputs"):
        fxfact.verify(small, result)
    with pytest.raises(PlanError, match="not made by a plan"):
        fxfact.verify(small, small, image)
    with pytest.raises(CaptureError, match="Small fails on these inputs"):
        fxfact.verify(small, result, image[:, :2])
    with pytest.raises(PlanError, match="first: the factorized network has a convolution here"):
        fxfact.verify(nn.Sequential(nn.Conv2d(4, 8, 3)), result, image)
    untouched = fxfact.factorize(small, exclude="*")
    assert fxfact.verify(small, untouched, image).graph == 0


class Mixed(nn.Module):
    """Convolutions in another precision than the output."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(8, 8, 3).to(torch.bfloat16 if how == "weights" else torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "weights":
            return self.conv(x.bfloat16()).float()
        if self.how == "output":
            return self.conv(x).double()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.conv(x)
        return y.float()


@pytest.mark.parametrize("how", ["weights", "output", "autocast"])
def test_verify_tolerates_the_rounding_of_the_convolutions_dtype(how: str) -> None:
    x = torch.randn(2, 8, 9, 9)
    small = fxfact.factorize(Mixed(how).eval(), rank=0.7, allow_growth=True, example_inputs=x, verify=True)
    assert fxfact.plan_of(small).rewrites


class Attribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(16, 8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, self.weight)


def test_verify_reads_a_weight_that_is_a_plain_attribute() -> None:
    model, x = Attribute().eval(), torch.randn(2, 8, 9, 9)
    small = fxfact.factorize(model, rank=0.5, example_inputs=x, verify=True)
    assert fxfact.verify(model, small, x).ok
    with pytest.raises(ArgumentTypeError, match=r"original must be a torch\.nn\.Module or ExportedProgram, got int"):
        fxfact.verify(3, small, x)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [1, 0.5, 0.9])
def test_verify_says_what_the_factorization_costs_apart_from_the_graph_check(
    small: Small, image: Tensor, rank: float
) -> None:
    verified = fxfact.verify(small, fxfact.factorize(small, rank=rank, allow_growth=True), image)
    cost, check = str(verified).split("\n\n")[1].splitlines()[:2]
    assert cost.startswith(f"approximation error {100 * verified.end_to_end:.0f} %: relative error of the output")
    assert check.startswith("graph check passed: on these inputs")
    assert verified.ok
    for word in ("near", "close", "right", " ok"):
        assert word not in str(verified)


def test_approximation_error_has_two_digits_or_is_unknown() -> None:
    texts = {0.574: "57 %", 1.2345: "123 %", 0.0234: "2.3 %", 1.2e-7: "1.2e-05 %", 0.0: "0 %"}
    for error, text in texts.items():
        assert format_approximation_error(error).startswith(f"approximation error {text}: ")
    for error in (float("inf"), float("nan")):
        assert format_approximation_error(error).startswith("approximation error unknown: ")


@pytest.mark.parametrize("capture", ["trace", "modules", "export", "decomposed"])
def test_verify_gives_the_output_errors_of_linear_layers(capture: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 9)).eval()
    x = torch.randn(4, 5, 6)
    chain = SVD().decompose(read_conv(model[2]), (2,))
    given = torch.tanh(model[0](x))
    expected = apart(model[2](given), run(chain, given))
    network, options = model, {"example_inputs": x, "capture": capture}
    if capture in ("export", "decomposed"):
        network = torch.export.export(model, (x,))
        network, options = (network.run_decompositions() if capture == "decomposed" else network), {}
    small = fxfact.factorize(network, "svd", rank={"0": 2, "2": 2}, allow_growth=True, **options)
    first, last = fxfact.verify(network, small, x).sites
    assert (first.path, last.path) == ("0", "2")
    assert last.output == pytest.approx(expected, rel=1e-3)
    assert last.weight == pytest.approx(
        apart(model[2].weight, chain.layers[1].weight @ chain.layers[0].weight), rel=1e-3
    )
