"""1×1 convolutions as matrix products: the same numbers, often sooner where maps are channels_last."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional


class _Linear(nn.Module):
    """Beneath a convolution's class: its forward multiplies every place of the map by the weight."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in, *size) or (in, *size) to (batch, out, *size) or (out, *size)."""
        weight, bias = cast(Tensor, self.weight), cast("Tensor | None", self.bias)
        channels = 1 - weight.ndim
        return functional.linear(input.movedim(channels, -1), weight.flatten(1), bias).movedim(-1, channels)


class PointwiseConv2d(_Linear, nn.Conv2d):
    """A 1×1 ``nn.Conv2d`` without stride, padding or groups, computed as a matrix product."""


class PointwiseConv3d(_Linear, nn.Conv3d):
    """A 1×1×1 ``nn.Conv3d`` without stride, padding or groups, computed as a matrix product."""


POINTWISE_TYPES: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: PointwiseConv2d, nn.Conv3d: PointwiseConv3d}
