"""A dense convolution with any number of spatial axes, as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from fxfact.conv.conv_attributes import ConvAttributes
from fxfact.conv.convolve import from_torch, run_weight, takes_output_size
from fxfact.conv.spec import ConvSpec
from fxfact.utils import check_memory


class ConvNd(ConvAttributes, nn.Module):
    """A convolution with any number of spatial axes, as ``nn.Conv2d`` is one with two.

    Input (batch, in, *size) or (in, *size), output (batch, out, *size) or (out, *size). With more than three axes it is
    computed as a sum of 3-D convolutions over the positions of the kernel along the other axes.

    Args:
        in_channels: the input channels.
        out_channels: the output channels.
        kernel_size: the size of the kernel.
        stride: the stride.
        padding: the padding, also 'same' or 'valid'.
        dilation: the dilation.
        groups: the groups.
        bias: whether it has a bias.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        order: the number of spatial axes. Needed if ``kernel_size`` is an int.
        transposed: whether it is a transposed convolution.
        output_padding: the additional output size of a transposed convolution.
        device: the device of the parameters.
        dtype: their type.

    Attributes:
        weight: the kernel (out, in / groups, *kernel), or (in, out / groups, *kernel) if it is transposed.
        bias: the bias (out,), or None.

    Raises:
        SpecError: if the arguments do not describe a convolution.
        ArgumentError: if the kernel is larger than the memory of the device.
    """

    bias: nn.Parameter | None

    def __init__(  # noqa: PLR0917 (the positions of nn.Conv2d)
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        order: int | None = None,
        transposed: bool = False,
        output_padding: int | Sequence[int] = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spec = ConvSpec.parse(
            in_channels,
            out_channels,
            kernel_size,
            order=order,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
            transposed=transposed,
            output_padding=output_padding,
            bias=bias,
        )
        like = torch.empty(0, device=device, dtype=dtype)
        check_memory(f"the kernel of {spec}", math.prod(spec.weight_shape), like)
        weight = nn.Parameter(like.new_empty(spec.torch_weight_shape))
        self._hold(spec, weight, nn.Parameter(like.new_empty(out_channels)) if bias else None)
        self.reset_parameters()

    @classmethod
    def holding(cls, spec: ConvSpec, weight: nn.Parameter, bias: nn.Parameter | None) -> Self:
        """Return the module of a convolution with these parameters.

        Args:
            spec: the convolution.
            weight: the kernel in PyTorch's layout.
            bias: the bias, or None.

        Returns:
            The module.
        """
        new = cls.__new__(cls)
        new._hold(spec, weight, bias)
        return new

    def _hold(self, spec: ConvSpec, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._spec = spec
        self.weight = weight
        self.register_parameter("bias", bias)

    def reset_parameters(self) -> None:
        """Draw new values, distributed as those of ``nn.Conv2d`` (He et al. 2015 with a = √5)."""
        bound = 1 / math.sqrt(math.prod(self.weight.shape[1:]))
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Map (batch, in, *size) or (in, *size) to (batch, out, *size) or (out, *size).

        Args:
            x: the input.
            output_size: the size of the output of a transposed convolution.

        Returns:
            The output.
        """
        spec = self._spec
        if takes_output_size(output_size, spec):
            spec = spec.for_output_size(tuple(x.shape[-spec.order :]), output_size)
        return run_weight(spec, from_torch(spec, self.weight), self.bias, x)

    @property
    def spec(self) -> ConvSpec:
        """The convolution."""
        return self._spec

    def extra_repr(self) -> str:
        """Describe the layer in ``repr``."""
        return str(self._spec)
