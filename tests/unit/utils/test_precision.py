"""Reduced precision is turned off inside of a block."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fxfact.utils import full_precision, no_reduced_precision


@pytest.fixture(autouse=True)
def reduced() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


def settings() -> set[str]:
    backends = torch.backends
    parts = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    return {part.fp32_precision for part in parts}


def test_precision_is_full_inside_and_restored_after_the_last_user() -> None:
    with full_precision():
        assert settings() == {"ieee"}
        with pytest.raises(ValueError, match="inside"), full_precision():
            raise ValueError("inside")
        assert settings() == {"ieee"}, "the outer block still needs it"
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_autocast_is_off_inside() -> None:
    x = torch.randn(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with no_reduced_precision(torch.device("cpu")):
            assert (x @ x).dtype == torch.float32
            assert settings() == {"ieee"}
        assert (x @ x).dtype == torch.bfloat16
