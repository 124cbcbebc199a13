from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fxfact.utils import difference, relative_error, tensors_of, tolerance_for


class Plain:
    def __init__(self, value: Tensor) -> None:
        self.value = value


def test_outputs_in_any_container_are_compared() -> None:
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


def test_complex_outputs_are_compared_within_rounding() -> None:
    for kind, tolerance in ((torch.complex64, 1e-4), (torch.complex128, 1e-10)):
        one = torch.tensor([1 + 1j], dtype=kind)
        assert tolerance_for(one) == tolerance
        assert difference(one, one * (1 + tolerance / 2), strictness=1.0) == ""
        assert "differs" in difference(one, one * (1 + 2 * tolerance), strictness=1.0)
