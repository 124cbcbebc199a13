"""The channel gains between two kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxfact.conv import ConvSpec
from fxfact.conv.channel_gains import channel_gains

SPEC = ConvSpec.parse(6, 8, (3, 2), groups=2)


def scaled(kernel: Tensor, out: Tensor, into: Tensor, groups: int) -> Tensor:
    of_row = into.reshape(groups, 1, -1).expand(-1, len(out) // groups, -1).reshape(len(out), -1)
    return kernel * out.reshape(-1, *[1] * (kernel.ndim - 1)) * of_row.reshape(*of_row.shape, *[1] * (kernel.ndim - 2))


def found(spec: ConvSpec, old: Tensor, new: Tensor, eps: float = 1e-12) -> tuple[Tensor, Tensor] | None:
    return channel_gains(spec, old, new, eps * old.abs())


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    "spec",
    [SPEC, ConvSpec.parse(5, 7, 3, order=1), ConvSpec.parse(4, 4, (2, 2, 1), groups=4), ConvSpec.parse(1, 3, (3, 3))],
    ids=str,
)
@pytest.mark.parametrize("sides", ["out", "in", "both"])
def test_gains_of_either_side_or_both_are_found(spec: ConvSpec, sides: str) -> None:
    old = draw(*spec.weight_shape)
    out = draw(spec.out_channels) if sides != "in" else torch.ones(spec.out_channels, dtype=torch.float64)
    into = draw(spec.in_channels) if sides != "out" else torch.ones(spec.in_channels, dtype=torch.float64)
    new = scaled(old, out, into, spec.groups)
    gains = found(spec, old, new)
    assert gains is not None
    torch.testing.assert_close(scaled(old, *gains, spec.groups), new)
    if sides == "out":
        torch.testing.assert_close(gains[0], out)
        assert gains[1].eq(1).all()


def test_gains_may_be_zero_and_an_empty_channel_keeps_its_own() -> None:
    old = draw(*SPEC.weight_shape)
    old[2] = 0
    out, into = draw(8), draw(6)
    out[0], into[4] = 0, 0
    gains = found(SPEC, old, scaled(old, out, into, 2))
    assert gains is not None
    torch.testing.assert_close(scaled(old, *gains, 2), scaled(old, out, into, 2))
    only_out = found(SPEC, old, scaled(old, out, torch.ones(6, dtype=torch.float64), 2))
    assert only_out is not None
    assert only_out[0][2] == 1


def test_equal_kernels_have_gains_of_exactly_one() -> None:
    old = draw(*SPEC.weight_shape)
    gains = found(SPEC, old, old)
    assert gains is not None
    assert all(gain.eq(1).all() for gain in gains)


@pytest.mark.parametrize("change", ["one value", "added", "clipped", "permuted", "nan", "low rank", "grown from zero"])
def test_other_changes_have_no_gains(change: str) -> None:
    old = draw(*SPEC.weight_shape)
    new = old.clone()
    if change == "one value":
        new[0, 0, 0, 0] *= 1 + 1e-9
    elif change == "added":
        new += 1e-9
    elif change == "clipped":
        new.clamp_(-1, 1)
    elif change == "permuted":
        new = new.flip(1)
    elif change == "nan":
        new[3, 1] = float("nan")
    elif change == "low rank":
        new += (draw(8, 1) @ draw(1, 18)).reshape(SPEC.weight_shape) * 1e-3
    else:
        old[0] = 0
    assert found(SPEC, old, new) is None


def test_differences_of_one_rounding_are_no_change_and_a_shift_of_all_values_by_one_is() -> None:
    old = draw(*SPEC.weight_shape).bfloat16()
    gain = torch.tensor(1.7, dtype=torch.float64)
    eps = torch.finfo(torch.bfloat16).eps
    assert found(SPEC, old.double(), (old.double() * gain).bfloat16().double(), eps) is not None
    assert found(SPEC, old.double(), (old.double() + eps * old.double().abs()), eps) is None
