"""Patches are the inputs that a convolution multiplies with its weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxfact.conv import ConvSpec, from_torch, spec_of, write_conv
from fxfact.finetune.patches import at_positions, iter_patches
from tests.support import random_input, random_layer


@pytest.mark.parametrize(
    "spec",
    [
        ConvSpec.parse(6, 8, (1, 1)),
        ConvSpec.parse(6, 8, (3, 2), stride=2, padding=1, dilation=(1, 2), bias=True),
        ConvSpec.parse(6, 8, (3, 3), padding=1, groups=2, padding_mode="reflect"),
        ConvSpec.parse(6, 4, (3, 2), stride=2, padding=1, output_padding=1, transposed=True, groups=2),
        ConvSpec.parse(4, 6, (3, 1), stride=(1, 3), padding=1, dilation=(2, 1), transposed=True, bias=True),
        ConvSpec.parse(6, 4, 4, order=1, padding="same"),
        ConvSpec.parse(4, 6, (1, 3, 3), stride=(2, 1, 1)),
    ],
    ids=str,
)
def test_patches_times_the_weight_are_the_output(spec: ConvSpec) -> None:
    layer, x = random_layer(spec), random_input(spec, batch=(9,))
    *pads, stage = write_conv(spec, layer.weight, layer.bias)
    x = nn.Sequential(*pads)(x)
    output = stage(x).flatten(2)
    rows = torch.cat(list(iter_patches(stage, x, 0)))
    own = spec_of(stage)
    matrix = from_torch(own, stage.weight).reshape(own.groups, own.out_channels // own.groups, -1)
    product = torch.einsum("npgs,gos->npgo", rows.unflatten(2, (own.groups, -1)), matrix).flatten(2)
    product = product if stage.bias is None else product + stage.bias
    if rows.shape[1] == output.shape[2]:
        torch.testing.assert_close(product.mT, output)
    else:  # each row is the output at some position
        nearest = torch.cdist(product, output.mT, compute_mode="donot_use_mm_for_euclid_dist").min(dim=2).values
        assert float(nearest.max()) < 1e-9 * float(output.norm())


@pytest.mark.parametrize("leading", [(), (9,), (9, 5), (9, 7, 6)])
def test_patches_of_a_linear_layer_are_its_inputs_at_some_positions(leading: tuple[int, ...]) -> None:
    stage, x = nn.Linear(4, 6), torch.randn(*leading, 4)
    inputs = torch.cat(list(iter_patches(stage, x, 3)))
    outputs = at_positions(spec_of(stage), stage(x), 3)
    torch.testing.assert_close(stage(inputs), outputs)
    positions = x[..., 0].numel() // max(1, len(x) if leading else 1)
    assert inputs.shape == (leading[0] if leading else 1, min(32, positions), 4)
    held = {tuple(row) for row in x.reshape(-1, 4).tolist()}
    assert all(tuple(row) in held for row in inputs.reshape(-1, 4).tolist())
