"""Refusals, and that their advice can be followed: what fails, what the message must say, and the call that it advises.

Every case has a call that is refused, and the same call after the advice was taken, which must succeed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.passes.infra.pass_manager import PassManager as TorchPassManager

import fxfact
from fxfact.cli import main
from fxfact.errors import (
    ArgumentError,
    ArgumentTypeError,
    CalibrationError,
    CaptureError,
    GraphError,
    PlanError,
    WeightError,
)
from fxfact.factorizations import CPMobilenet
from fxfact.nn import TuckerConv
from fxfact.passes import DecomposeOptions, FactorizeConvs, FoldBatchNorms, PassManager
from tests.support import EqualLayers

_Call = Callable[[], Any]
X = torch.randn(24, 3, 9, 9, generator=torch.Generator().manual_seed(0))
BATCHES = list(X.split(6))


class Net(nn.Module):
    """Two convolutions, a norm, and ``output`` of the logits (n, 4)."""

    def __init__(self, output: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)
        self.output = output

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.output(self.head(x.mean((2, 3))))


class BranchingNet(Net):
    """Python that torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x if float(x.sum()) < 1e9 else -x)


def net(output: Callable[[Tensor], Any] = lambda logits: logits, kind: type[Net] = Net) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(output).eval()


def small(model: nn.Module | None = None) -> nn.Module:
    return fxfact.factorize(net() if model is None else model, "tucker", rank=0.5, example_inputs=X)


def spoiled(model: nn.Module, name: str, nan: int = 0, inf: int = 0) -> nn.Module:
    """A copy with this many NaN and Inf in one tensor."""
    model = copy.deepcopy(model)
    flat = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name].detach().view(-1)
    flat[:nan], flat[nan : nan + inf] = torch.nan, torch.inf
    return model


@dataclass(frozen=True)
class Case:
    """A refused call, what its message must contain, and the same call after the advice was taken."""

    refused: _Call
    error: type[Exception]
    text: str
    advised: _Call


@cache
def factorized_net() -> nn.Module:
    return small()


ENTRY_POINTS: dict[str, Callable[[nn.Module], Any]] = {
    "calibrate": lambda m: fxfact.calibrate(m, BATCHES),
    "plan": lambda m: fxfact.plan(m, rank=0.5, calibration=BATCHES),
    "plan, budget": lambda m: fxfact.plan(m, "channel_svd", budget=fxfact.Macs(0.7), calibration=BATCHES),
    "plan, loss": lambda m: fxfact.plan(m, "channel_svd", budget=fxfact.Loss(0.1), calibration=BATCHES),
    "factorize": lambda m: fxfact.factorize(m, "channel_svd", rank=0.5, calibration=BATCHES),
    "factorize, verify": lambda m: fxfact.factorize(m, rank=0.5, example_inputs=X, exclude="first", verify=True),
    "refit": lambda m: fxfact.refit(factorized_net(), m, BATCHES),
    "distill": lambda m: fxfact.distill(factorized_net(), m, BATCHES, steps=1),
    "verify": lambda m: fxfact.verify(m, factorized_net(), X),
}  # every one that runs a model on data


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
@pytest.mark.parametrize(
    ("tensor", "nan", "inf", "count"),
    [
        ("first.weight", 3, 1, "3 NaN and 1 Inf among 324 values"),
        ("norm.running_var", 2, 0, "2 NaN among 12 values"),
        ("head.bias", 0, 1, "1 Inf among 4 values"),
    ],
)
def test_weight_that_is_not_finite_is_named_with_its_count(
    entry_point: str, tensor: str, nan: int, inf: int, count: str
) -> None:
    model = net()
    call = ENTRY_POINTS[entry_point]
    with pytest.raises(WeightError, match=re.escape(f"because of its own weights: {tensor} has {count}")):
        call(spoiled(model, tensor, nan, inf))
    call(model)


@pytest.mark.parametrize("call", ["refit", "distill", "verify"])
def test_factorized_network_that_is_not_finite_is_named(call: str) -> None:
    model = net()
    factorized = small(model)
    calls: dict[str, Callable[[nn.Module], Any]] = {
        "refit": lambda network: fxfact.refit(network, model, BATCHES),
        "distill": lambda network: fxfact.distill(network, model, BATCHES, steps=1),
        "verify": lambda network: fxfact.verify(model, network, X),
    }
    name = next(name for name, _ in factorized.named_parameters() if name.startswith("second"))
    with pytest.raises(WeightError, match=rf"the factorized network computes NaN .*: {name} has 1 NaN among"):
        calls[call](spoiled(factorized, name, nan=1))
    calls[call](factorized)


def test_exported_program_with_a_weight_that_is_not_finite() -> None:
    program = torch.export.export(spoiled(net(), "second.bias", nan=2), (X,))
    with pytest.raises(WeightError, match=r"second\.bias has 2 NaN among 16 values"):
        fxfact.calibrate(program, [X])


def test_data_are_named_if_the_weights_are_finite() -> None:
    """A mask of -inf is no fault of the model."""
    model = net()
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    with pytest.raises(CalibrationError, match=r"although its weights are finite\. Drop the samples"):
        fxfact.calibrate(model, [3e38 * (X / X.abs().max())])
    fxfact.calibrate(model, [X])


def test_only_the_first_tensors_that_are_not_finite_are_named() -> None:
    model = net()
    for parameter in model.parameters():
        parameter.detach().fill_(torch.nan)
    with pytest.raises(
        WeightError, match=r"first.weight .*; first.bias .*; norm.weight .*, and 5 more tensors are not"
    ):
        fxfact.calibrate(model, BATCHES)


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], str, Callable[[Tensor], Any]]] = {
    "argmax": (lambda y: y.argmax(1), r"\(6,\) left out: int64.*the logits instead of their argmax", lambda y: y),
    "one hot": (
        lambda y: nn.functional.one_hot(y.argmax(1), 4),
        r"\(6, 4\) left out: int64.*the logits instead",
        lambda y: y,
    ),
    "comparison": (
        lambda y: y > 0,
        r"\(6, 4\) left out: bool.*Return the numbers that they are computed from",
        lambda y: y,
    ),
    "labels in a dict": (lambda y: {"label": y.argmax(1)}, "Return the numbers", lambda y: {"logits": y}),
    "complex": (lambda y: torch.complex(y, y), r"torch\.view_as_real", lambda y: torch.stack([y, y], -1).flatten(1)),
    "mean": (lambda y: y.mean(), r"\(\) left out: without an axis.*Return one value for each sample", lambda y: y),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("likelihood", [None, "categorical", "gaussian"])
def test_output_without_numbers_says_what_to_return(kind: str, likelihood: Any) -> None:
    output, text, better = OUTPUTS[kind]
    with pytest.raises(CalibrationError, match=text):
        fxfact.calibrate(net(output), BATCHES, likelihood=likelihood)
    fxfact.calibrate(net(better), BATCHES)


@pytest.mark.parametrize("call", [fxfact.refit, partial(fxfact.distill, steps=1)], ids=["refit", "distill"])
def test_measuring_asks_for_a_function_of_two_outputs(call: Any) -> None:
    """A function of one output gives gradients, and refit and distill measure a loss."""
    model = net(lambda y: (y, y))
    with pytest.raises(
        CalibrationError, match=r"cannot measure how far.*Pass a function divergence\(expected, found\)"
    ):
        call(small(model), model, BATCHES, likelihood=lambda y: y[0].sum())
    call(small(model), model, BATCHES, likelihood=lambda expected, found: (expected[0] - found[0]).square().sum(1))


def test_ranks_can_be_chosen_by_a_function_and_measured_by_a_likelihood() -> None:
    model, budget = net(), fxfact.Macs(0.7)
    given: dict[str, Any] = {"budget": budget, "held_out": BATCHES[3:]}
    with pytest.raises(CalibrationError, match=r"calibration=fxfact.calibrate\(.*held_out= and example_inputs="):
        fxfact.plan(model, "channel_svd", calibration=BATCHES[:3], likelihood=lambda y: y.sum(), **given)
    statistics = fxfact.calibrate(model, BATCHES[:3], likelihood=lambda y: y.sum())
    fxfact.plan(model, "channel_svd", calibration=statistics, likelihood="gaussian", example_inputs=X, **given)


# torch.compile(model, backend="fxfact", options=...)


def compiled(options: dict[Any, Any], backend: Any = "fxfact") -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(nn.Conv2d(3, 8, 3), backend=backend, options=options)(X)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rnak": 0.5}, "there is no option 'rnak'. Did you mean 'rank'"),
        ({"factorisation": "cp"}, "Did you mean 'factorization'"),
        ({"rnak": 0.5, "inner": "eager"}, "there is no option 'rnak'. Did you mean 'rank'"),
        ({"max_autotun": True}, "Did you mean 'max_autotune'"),
        ({"triton.cudagraph": True}, "Did you mean 'triton.cudagraphs'"),
        ({1: 2}, "there is no option 1. The options of fxfact are factorization, rank"),
        ({"inner": "eagr"}, "inner: there is no backend 'eagr'. Did you mean 'eager'"),
        ({"mode": "default"}, r"torch.compile\(model, backend=fxfact.backend\(...\), mode=...\)"),
    ],
)
def test_unknown_option_of_the_backend_names_the_nearest(options: dict[Any, Any], text: str) -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=f"ArgumentError: .*{text}"):
        compiled(options)


def test_option_of_the_backend_is_no_option_of_torch_compile() -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"Pass fxfact.backend\(rank=...\)"):
        compiled({"rank": 0.3}, fxfact.backend("tucker"))
    compiled({}, fxfact.backend("tucker", rank=0.3, inner="eager"))


def test_options_of_the_inner_backend_are_passed_on() -> None:
    seen: list[Any] = []

    def inner(graph_module: Any, inputs: Any, **keywords: Any) -> Any:
        seen.append(keywords)
        return graph_module.forward

    compiled({"inner": inner, "rank": 0.5, "level": 3})
    compiled({"level": 4}, fxfact.backend(inner=inner))
    assert seen == [{"options": {"level": 3}}, {"options": {"level": 4}}]


# Passes in pass managers


def test_pass_manager_says_why_a_pass_failed() -> None:
    model = net()
    other = fxfact.plan(nn.Sequential(nn.Conv2d(3, 8, 3)), rank=0.5)
    manager = PassManager([FoldBatchNorms(), FactorizeConvs(other)])
    with pytest.raises(PlanError, match=r"the 'FactorizeConvs' pass after .*'FoldBatchNorms'.*made for another model"):
        manager(torch.fx.symbolic_trace(model))
    plan = fxfact.plan(model, rank=0.5)
    assert PassManager([FactorizeConvs(plan), FoldBatchNorms()])(torch.fx.symbolic_trace(model)).modified


def test_pass_manager_says_what_is_wrong_with_a_graph() -> None:
    graph_module = torch.fx.symbolic_trace(net())
    next(iter(graph_module.graph.find_nodes(op="call_function", target=torch.relu))).target = torch.sigmoid
    with pytest.raises(GraphError, match=r"'FoldBatchNorms' pass .*not recompiled. Call graph_module.recompile\(\)"):
        PassManager([FoldBatchNorms()])(graph_module)
    graph_module.recompile()
    PassManager([FoldBatchNorms()])(graph_module)


def test_errors_of_other_passes_stay_as_they_are() -> None:
    def fails(graph_module: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(Exception, match="An error occurred when running the 'fails' pass") as raised:
        PassManager([fails])(torch.fx.symbolic_trace(net()))
    assert isinstance(raised.value.__cause__, KeyError)
    assert isinstance(PassManager([]), TorchPassManager)


# Other refusals


def hooked(path: str) -> nn.Module:
    model = net()
    model.get_submodule(path).register_forward_hook(lambda module, args, output: None)
    return model


def random_cp() -> CPMobilenet:
    return CPMobilenet(init="random")


@cache
def plan() -> fxfact.Plan:
    return fxfact.plan(net(), rank=0.5)


@cache
def statistics() -> fxfact.Statistics:
    return fxfact.calibrate(net(), BATCHES)


@cache
def plan_with_data() -> fxfact.Plan:
    return fxfact.plan(net(), "channel_svd", rank=0.5, calibration=statistics())


@cache
def program() -> torch.export.ExportedProgram:
    return torch.export.export(net(), (X,))


def equal_layers(*, others: bool = False) -> nn.Module:
    return EqualLayers(others=others).eval()


def sharing() -> nn.Module:
    return fxfact.factorize(equal_layers(), rank=4, joint="convs.*", include="convs.*", capture="modules")


MAPS = torch.zeros(1, 4, 10, 10)
EMPTY = DecomposeOptions(weights="empty")
CASES: dict[str, Case] = {
    "a pass needs statistics": Case(
        lambda: FactorizeConvs(plan_with_data())(torch.fx.symbolic_trace(net())),
        PlanError,
        "Pass what fxfact.calibrate returned as statistics=",
        lambda: FactorizeConvs(plan_with_data(), statistics=statistics())(torch.fx.symbolic_trace(net())),
    ),
    "a pass can leave weights empty": Case(
        lambda: FactorizeConvs(plan_with_data())(torch.fx.symbolic_trace(net())),
        PlanError,
        "options=DecomposeOptions(weights='empty')",
        lambda: FactorizeConvs(plan_with_data(), options=EMPTY)(torch.fx.symbolic_trace(net())),
    ),
    "apply needs the data": Case(
        lambda: fxfact.apply(plan_with_data(), net()),
        PlanError,
        "Pass them as calibration=",
        lambda: fxfact.apply(plan_with_data(), net(), calibration=BATCHES),
    ),
    "apply can leave weights empty": Case(
        lambda: fxfact.apply(plan_with_data(), net()),
        PlanError,
        "pass weights='empty'",
        lambda: fxfact.apply(plan_with_data(), net(), weights="empty"),
    ),
    "a pass needs a graph module": Case(
        lambda: FoldBatchNorms()(net()),  # type: ignore[arg-type]
        ArgumentTypeError,
        "got Net. Pass torch.fx.symbolic_trace(model)",
        lambda: FoldBatchNorms()(torch.fx.symbolic_trace(net())),
    ),
    "a plan of a program for a module": Case(
        lambda: fxfact.apply(fxfact.plan(program(), rank=0.5), net()),
        PlanError,
        "made for an ExportedProgram. Pass torch.export.export(model, args)",
        lambda: fxfact.apply(fxfact.plan(program(), rank=0.5), torch.export.export(net(), (X,))),
    ),
    "a plan of a graph for a model that cannot be traced": Case(
        lambda: fxfact.apply(plan(), net(kind=BranchingNet)),
        CaptureError,
        "made for a model that 'trace' can capture. Make a new plan of this one.",
        lambda: fxfact.apply(fxfact.plan(net(kind=BranchingNet), rank=0.5, example_inputs=X), net(kind=BranchingNet)),
    ),
    "a plan for a convolution that has hooks now": Case(
        lambda: fxfact.apply(plan(), hooked("second")),
        PlanError,
        "the model one that cannot be rewritten (it has hooks",
        lambda: fxfact.apply(fxfact.plan(hooked("second"), rank=0.5), hooked("second")),
    ),
    "factorize has no weights='empty'": Case(
        lambda: fxfact.factorize(net().to("meta"), rank=0.5),
        WeightError,
        "plans with fixed ranks, and fxfact.apply(plan, model, weights='empty')",
        lambda: fxfact.apply(fxfact.plan(net().to("meta"), rank=0.5), net().to("meta"), weights="empty"),
    ),
    "from_conv has decompose_weights": Case(
        lambda: TuckerConv.from_conv(nn.Conv2d(4, 8, 3, device="meta")),
        WeightError,
        "Pass decompose_weights=False",
        lambda: TuckerConv.from_conv(nn.Conv2d(4, 8, 3, device="meta"), decompose_weights=False),
    ),
    "random factors need a generator": Case(
        lambda: fxfact.factorize(net(), random_cp(), rank=0.5),
        ArgumentError,
        "Pass one",
        lambda: fxfact.factorize(net(), random_cp(), rank=0.5, generator=torch.Generator()),
    ),
    "the backend has no generator": Case(
        lambda: compiled({"factorization": random_cp(), "inner": "eager"}),
        torch._dynamo.exc.BackendCompilerFailed,
        "take init='svd'",
        lambda: compiled({"factorization": CPMobilenet(init="svd"), "inner": "eager"}),
    ),
    "unlike layers cannot share stages": Case(
        lambda: fxfact.plan(equal_layers(), rank=4, joint="[sc]*"),
        ArgumentError,
        "Name one set for each kind",
        lambda: fxfact.plan(equal_layers(), rank=4, joint=["convs.*", "heads.*"]),
    ),
    "a layer belongs to one joint set": Case(
        lambda: fxfact.plan(equal_layers(), rank=4, joint=["convs.*", "convs.[12]"]),
        ArgumentError,
        "A layer belongs to one set: narrow one of the globs",
        lambda: fxfact.plan(equal_layers(), rank=4, joint=["convs.[12]"]),
    ),
    "tied layers are left out of joint sets": Case(
        lambda: fxfact.plan(equal_layers(others=True), rank=4, joint="[ct]*.?"),
        ArgumentError,
        "Leave them out of the set",
        lambda: fxfact.plan(equal_layers(others=True), rank=4, joint="c*.?"),
    ),
    "layers with groups are left out of joint sets": Case(
        lambda: fxfact.plan(equal_layers(others=True), rank=4, joint="[cg]*.?"),
        ArgumentError,
        "Leave it out of the set",
        lambda: fxfact.plan(equal_layers(others=True), rank=4, joint="c*.?"),
    ),
    "joint sets save no time": Case(
        lambda: fxfact.plan(equal_layers(), budget=fxfact.Latency(0.9), example_inputs=MAPS, joint="convs.*"),
        ArgumentError,
        "Pass a budget of parameters, such as fxfact.Params(0.5), or leave joint out",
        lambda: fxfact.plan(equal_layers(), budget=fxfact.Params(0.5), example_inputs=MAPS, joint="convs.*"),
    ),
    "a shared stage is not scaled for one layer": Case(
        lambda: sharing().convs[1].weight.detach().mul_(2),
        WeightError,
        "Put layer.to_conv(), an ordinary convolution, in its place first",
        lambda: sharing().convs[1].to_conv().weight.detach().mul_(2),
    ),
    "a function without gradient": Case(
        lambda: fxfact.calibrate(net(), BATCHES, likelihood=lambda y: y.detach().sum()),
        CalibrationError,
        "computed from the output without detach()",
        lambda: fxfact.calibrate(net(), BATCHES, likelihood=lambda y: y.sum()),
    ),
}


@pytest.mark.parametrize("situation", CASES)
def test_advice_can_be_followed(situation: str) -> None:
    case = CASES[situation]
    with pytest.raises(case.error, match=re.escape(case.text)):
        case.refused()
    case.advised()


class Doubling(nn.Conv2d):
    """Computes its weight in a way of its own."""

    def __init__(self) -> None:
        super().__init__(3, 8, 3)
        self.raw = nn.Parameter(self._parameters.pop("weight").detach())  # type: ignore[union-attr]

    @property
    def weight(self) -> Tensor:
        return self.raw * 2


def test_fold_weights_is_not_advised_after_it_was_passed() -> None:
    options: dict[str, Any] = {"rank": 0.5, "example_inputs": X}
    by_modules = fxfact.plan(nn.Sequential(Doubling()), capture="modules", **options)
    assert by_modules["0"].reason.endswith("fold_weights=True folds those of torch.nn.utils")
    by_modules = fxfact.plan(nn.Sequential(Doubling()), capture="modules", fold_weights=True, **options)
    assert by_modules["0"].reason.endswith("so that fold_weights=True does not fold it")
    weight_norm = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)))
    assert fxfact.plan(weight_norm, capture="modules", fold_weights=True, **options).rewrites


# On the command line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", X.numpy())
    return tmp_path


NET, BRANCHING = f"{__name__}:Net", f"{__name__}:BranchingNet"
COMMANDS: dict[str, tuple[str, str, str]] = {
    "example inputs": (
        f"plan {NET} --macs 0.9 --factorization channel_svd",
        "example inputs (--input 1,3,224,224)",
        f"plan {NET} --macs 0.9 --factorization channel_svd --input 1,3,9,9",
    ),
    "data": (
        f"plan {NET} --loss 0.5 --input 1,3,9,9 --factorization channel_svd",
        "pass two or more as --calibration",
        f"plan {NET} --loss 0.5 --calibration data.npy --batch 12 --factorization channel_svd",
    ),
    "batches": (
        f"plan {NET} --loss 0.5 --calibration data.npy --factorization channel_svd",
        "Pass smaller batches (--batch N)",
        f"plan {NET} --loss 0.5 --calibration data.npy --batch 12 --factorization channel_svd",
    ),
    "only in Python": (
        f"plan {BRANCHING} --rank 0.5",
        "capture= can only be passed in Python",
        f"plan {BRANCHING} --rank 0.5 --input 1,3,9,9",
    ),
    "weights that compress wrote": (
        f"verify {NET} small.pt --input 1,3,9,9",
        "Pass a file of weights as --weights or --other-weights.",
        f"verify {NET} {NET} --other-weights small.pt --input 1,3,9,9",
    ),
    "program without example inputs": (
        "plan bare.pt2 --macs 0.9 --factorization channel_svd",
        "example inputs (--input 1,3,224,224)",
        "plan bare.pt2 --macs 0.9 --factorization channel_svd --input 24,3,9,9",
    ),
    "program with example inputs": (
        "plan whole.pt2 --macs 0.9 --factorization channel_svd --input 24,3,9,9",
        "whole.pt2 contains its example inputs. Remove --input.",
        "plan whole.pt2 --macs 0.9 --factorization channel_svd",
    ),
}


@pytest.mark.parametrize("situation", COMMANDS)
def test_advice_can_be_followed_on_the_command_line(
    situation: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused, text, advised = COMMANDS[situation]
    if ".pt2" in refused:
        torch.export.save(program(), "whole.pt2")
        bare = torch.export.export(net(), (X,))
        bare.example_inputs = None
        torch.export.save(bare, "bare.pt2")
    fxfact.save(factorized_net(), "small.pt")
    assert main(refused.split()) == 1
    assert text in capsys.readouterr().err
    assert main(advised.split()) == 0


def test_options_that_a_command_does_not_have_are_not_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", NET, NET, "--input", "1,3,9,9"]) == 1
    assert "--calibration" not in capsys.readouterr().err
