"""verify tells a stage that overflows apart from a graph that is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

import fxfact
from fxfact.analysis import check_rewrite
from fxfact.analysis.reference import stages_of
from fxfact.errors import VerificationError

Conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ConvTranspose: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Net(nn.Module):
    def __init__(self, order: int = 2, *, transposed: bool = False, last: nn.Module | None = None) -> None:
        super().__init__()
        kind = (ConvTranspose if transposed else Conv)[order - 1]
        self.stem, self.body, self.last = kind(4, 8, 3), kind(8, 8, 3), last or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.body(self.stem(x).relu()))
        return result


def overloaded(network: nn.Module, path: str, k: int) -> None:
    """Make the values between stages k and k + 1 larger by 2^15, and change nothing else."""
    stages: Any = stages_of(network, fxfact.plan_of(network)[path])
    with torch.no_grad():
        stages[k].weight.mul_(2.0**15)
        stages[k + 1].weight.mul_(2.0**-15)


def half_network(model: nn.Module, x: Tensor, method: str = "tucker", **options: Any) -> Any:
    return fxfact.factorize(model, method, rank=0.7, allow_growth=True, example_inputs=x, **options)


@pytest.mark.parametrize("capture", ["trace", "modules", "export"])
@pytest.mark.parametrize(("method", "k"), [("tucker", 0), ("tucker", 1), ("channel_svd", 0), ("cp", 1)])
def test_verify_names_the_first_stage_that_overflows(capture: str, method: str, k: int) -> None:
    torch.manual_seed(0)
    model, x = Net().half().eval(), torch.randn(2, 4, 9, 9).mul(50).half()
    program = export(model, (x,)) if capture == "export" else None
    small = half_network(model if program is None else program, x, method, **({} if program else {"capture": capture}))
    assert fxfact.verify(program or model, small, x).overflow is None
    network = small if program is None else small.module()
    for path in ("body", "stem"):
        overloaded(network, path, k)
    found = fxfact.verify(program or model, small if program is None else network, x)
    assert (found.overflow, found.ok) == (f"stem.{k}", False)
    assert found.graph <= 0.01 < found.tolerance
    assert f"OVERFLOW: the output of stem.{k} overflows on these inputs" in str(found)
    assert "exclude='stem'" in str(found)
    assert "graph check passed" in str(found)
    assert "in single precision" in str(found)


@pytest.mark.parametrize(("order", "transposed"), [(1, False), (3, False), (2, True), (1, True)])
def test_verify_names_the_stage_for_every_kind_of_convolution(order: int, transposed: bool) -> None:
    torch.manual_seed(0)
    model, x = Net(order, transposed=transposed).half().eval(), torch.randn(2, 4, *[7] * order).mul(50).half()
    small = half_network(model, x)
    overloaded(small, "body", 1)
    found = fxfact.verify(model, small, x)
    assert (found.overflow, found.ok) == ("body.1", False)
    assert found.graph <= found.tolerance


def test_check_of_a_rewrite_says_overflow_instead_of_a_wrong_graph() -> None:
    torch.manual_seed(0)
    model, x = Net().half().eval(), torch.randn(2, 4, 9, 9).mul(50).half()
    small = half_network(model, x, verify=True)
    overloaded(small, "stem", 0)
    with pytest.raises(VerificationError, match=r"output of stem\.0 overflows .* to bfloat16 or float32, or keep this"):
        check_rewrite(model, small, x)
    wrong: Any = half_network(model, x)
    overloaded(wrong, "stem", 0)
    wrong.get_submodule("body.1").dilation = (2, 2)
    with pytest.raises(VerificationError, match="so its graph is wrong"):
        check_rewrite(model, wrong, x)


def test_overflow_hidden_by_a_bounded_output_is_found() -> None:
    torch.manual_seed(0)
    model, x = Net(last=nn.Tanh()).half().eval(), torch.randn(2, 4, 9, 9).mul(50).half()
    small = half_network(model, x)
    overloaded(small, "stem", 0)
    assert fxfact.verify(model, small, x).overflow == "stem.0"


def test_no_overflow_is_reported_where_the_original_overflows_or_the_graph_is_wrong() -> None:
    torch.manual_seed(0)
    model, x = Net().half().eval(), torch.randn(2, 4, 9, 9).mul(50).half()
    with torch.no_grad():
        model.body.weight.mul_(2e4)
    found = fxfact.verify(model, half_network(model, x), x)
    assert found.overflow is None
    assert "OVERFLOW" not in str(found)
    model = Net().half().eval()
    wrong: Any = half_network(model, x)
    wrong.get_submodule("body.1").dilation = (2, 2)
    assert (fxfact.verify(model, wrong, x).overflow, fxfact.verify(model, wrong, x).ok) == (None, False)


class Autocast(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            result: Tensor = super().forward(x)
        return result.float()


def test_overflow_under_autocast_is_found() -> None:
    torch.manual_seed(0)
    model, x = Autocast().eval(), torch.randn(2, 4, 9, 9) * 50
    small = half_network(model, x)
    assert fxfact.verify(model, small, x).overflow is None
    overloaded(small, "stem", 1)
    found = fxfact.verify(model, small, x)
    assert (found.overflow, found.ok) == ("stem.1", False)
    assert "graph check not possible" in str(found), "it computes in half precision whatever the inputs are"
    with pytest.raises(VerificationError, match=r"output of stem\.1 overflows"):
        check_rewrite(model, small, x)


def test_report_says_overflow() -> None:
    torch.manual_seed(0)
    model, x = Net().half().eval(), torch.randn(2, 4, 9, 9).mul(50).half()
    small = half_network(model, x)
    overloaded(small, "stem", 0)
    report = fxfact.report(model, small, x)
    assert (report.overflow, report.ok) == ("stem.0", False)
    assert "OVERFLOW: the output of stem.0" in str(report)
    assert report.to_json()["overflow"] == "stem.0"
