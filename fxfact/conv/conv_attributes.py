"""The attributes of ``nn.Conv2d`` for layers that hold a ConvSpec."""

from __future__ import annotations

from fxfact.conv.spec import ConvSpec, Padding, Sizes, torch_padding


class ConvAttributes:
    """Gives a layer with a ``spec`` the attributes of a convolution of PyTorch."""

    @property
    def spec(self) -> ConvSpec:
        """The convolution that this layer computes."""
        raise NotImplementedError

    @property
    def order(self) -> int:
        """The number of spatial axes."""
        return self.spec.order

    @property
    def in_channels(self) -> int:
        """The number of input channels."""
        return self.spec.in_channels

    @property
    def out_channels(self) -> int:
        """The number of output channels."""
        return self.spec.out_channels

    @property
    def kernel_size(self) -> Sizes:
        """The size of the dense kernel per axis."""
        return self.spec.kernel_size

    @property
    def stride(self) -> Sizes:
        """The stride per axis."""
        return self.spec.stride

    @property
    def padding(self) -> Sizes | str | Padding:
        """The padding per axis, or 'same', as for ``nn.Conv2d``, or pairs (before, after) where it has none."""
        return torch_padding(self.spec) or self.spec.padding

    @property
    def dilation(self) -> Sizes:
        """The dilation per axis."""
        return self.spec.dilation

    @property
    def groups(self) -> int:
        """The number of groups."""
        return self.spec.groups

    @property
    def padding_mode(self) -> str:
        """'zeros', 'reflect', 'replicate' or 'circular'."""
        return self.spec.padding_mode

    @property
    def transposed(self) -> bool:
        """Whether this is a transposed convolution."""
        return self.spec.transposed

    @property
    def output_padding(self) -> Sizes:
        """The additional output size per axis, of a transposed convolution."""
        return self.spec.output_padding
