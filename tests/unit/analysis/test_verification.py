"""verify: what it says of a right network, of a wrong one, and of what was never factorized."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

import fxfact
from fxfact.analysis.verification import with_composed_kernels
from fxfact.conv import read_conv, run
from fxfact.errors import ArgumentError, ArgumentTypeError, CaptureError, PlanError
from fxfact.factorizations import Tucker
from fxfact.utils import difference, relative_error, tensors_of, tolerance_for
from tests.support import Branching, Small, apart


class Plain:
    def __init__(self, value: Tensor) -> None:
        self.value = value


@pytest.mark.parametrize("kind", [Small, Branching])
def test_errors_are_told_by_site_and_end_to_end(kind: type[Small], image: Tensor) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    result = fxfact.factorize(model, rank=0.5, example_inputs=image)
    verified = fxfact.verify(model, result, image)
    assert verified.ok
    assert verified.graph < 1e-5
    assert verified.tolerance == 1e-4
    assert verified.end_to_end == pytest.approx(apart(model(image), result(image)), rel=1e-3)
    plan = fxfact.plan_of(result)
    known = {row.path: row.relative_error for row in fxfact.inspect(result).rows}
    assert {site.path: site.weight for site in verified.sites} == pytest.approx(known, rel=1e-4)
    seen: list[Tensor] = []
    chain = Tucker().decompose(read_conv(model.second), plan["second"].rank)
    model.second.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(image)
    assert verified.sites[1].output == pytest.approx(apart(model.second(seen[0]), run(chain, seen[0])), rel=1e-3)
    shown = str(verified)
    assert "second" in shown
    assert "(right)" in shown


@pytest.mark.parametrize("kind", [Small, Branching])
def test_a_wrong_network_is_called_wrong(kind: type[Small], image: Tensor) -> None:
    model = kind().eval()
    result = fxfact.factorize(model, rank=0.5, example_inputs=image)
    wrong = copy.deepcopy(result)
    wrong.get_submodule("second.1").padding = (0, 0)
    verified = fxfact.verify(model, wrong, image)
    assert not verified.ok
    assert "WRONG" in str(verified)
    trained = copy.deepcopy(result)
    with torch.no_grad():
        trained.get_submodule("first.0").weight.mul_(3)
    assert fxfact.verify(model, trained, image).ok, "it does what its own kernels say, whatever these are"
    assert fxfact.verify(model, trained, image).sites[0].weight > 1


def test_the_reference_is_the_original_with_composed_kernels(small: Small, image: Tensor) -> None:
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


def test_what_cannot_be_verified_is_refused(small: Small, image: Tensor) -> None:
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


def test_outputs_are_compared_whatever_they_come_in() -> None:
    @dataclass
    class Output:
        logits: Tensor
        more: dict[str, list[Tensor]]
        none: None = None

    x = torch.tensor([3.0, 4.0])
    one, other = Output(x, {"a": [x]}), Output(x, {"a": [x + torch.tensor([0.0, 5e-3])]})
    assert len(list(tensors_of(one))) == 2
    assert relative_error(one, other) == pytest.approx(1e-3, rel=1e-3), "of the tensor that is furthest off"
    assert relative_error(Plain(x), Plain(2 * x)) == 1
    assert relative_error(None, None) == float("inf")
    assert difference(one, other, strictness=1.0).startswith("its output differs from the model's by 1.0e-03")
    assert "int64 (2,), the model's float32 (2,)" in difference(x, x.long(), strictness=1.0)
    assert difference((x, x.long()), (x, x.long() + 1), strictness=1.0)
    assert difference((x, x.long()), (x, x.long()), strictness=0.0) == ""
    assert "no tensors" in difference({}, {}, strictness=1.0)
    assert relative_error(x, torch.zeros(3)) == float("inf")
    assert relative_error((x, x), (x,)) == float("inf")
    assert relative_error(torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0])) == 0
    assert relative_error(torch.tensor([float("inf"), 1.0]), torch.tensor([2.0, 1.0])) == float("inf")
    assert relative_error(torch.tensor([1.0]), torch.tensor([float("nan")])) == float("inf")
    assert relative_error(torch.tensor([3, 4]), torch.tensor([3, 5])) == pytest.approx(0.2)
    assert tolerance_for(one) == 1e-4
    assert tolerance_for((x.double(), x.bfloat16())) == 5e-2


class Mixed(nn.Module):
    """Convolutions in another precision than what comes out."""

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
def test_the_tolerance_is_that_of_what_convolutions_are_computed_in(how: str) -> None:
    x = torch.randn(2, 8, 9, 9)
    small = fxfact.factorize(Mixed(how).eval(), rank=0.7, allow_growth=True, example_inputs=x, verify=True)
    assert fxfact.plan_of(small).rewrites


class Attribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(16, 8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, self.weight)


def test_a_weight_that_is_a_plain_attribute_is_verified() -> None:
    model, x = Attribute().eval(), torch.randn(2, 8, 9, 9)
    small = fxfact.factorize(model, rank=0.5, example_inputs=x, verify=True)
    assert fxfact.verify(model, small, x).ok
    with pytest.raises(ArgumentTypeError, match=r"original must be a torch\.nn\.Module or ExportedProgram, got int"):
        fxfact.verify(3, small, x)  # type: ignore[arg-type]


def test_complex_outputs_are_compared_within_rounding() -> None:
    for kind, tolerance in ((torch.complex64, 1e-4), (torch.complex128, 1e-10)):
        one = torch.tensor([1 + 1j], dtype=kind)
        assert tolerance_for(one) == tolerance
        assert difference(one, one * (1 + tolerance / 2), strictness=1.0) == ""
        assert "differs" in difference(one, one * (1 + 2 * tolerance), strictness=1.0)
