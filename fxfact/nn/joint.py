"""Joint layers: several convolutions of one shape that share a single factorized tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from fxfact.conv import (
    ConvAttributes,
    ConvLayer,
    ConvSpec,
    Sizes,
    Skip,
    compose_weights,
    read_conv,
    run_weight,
    write_conv_module,
)
from fxfact.errors import ArgumentError, ArgumentTypeError, RefusedError
from fxfact.factorizations import RankSpec, check_generator
from fxfact.nn.joint_tensor import JointTensors, chain_rank, decompose_jointly, empty_tensors, joint_chain, joint_rank
from fxfact.nn.staged_conv import is_dense_conv
from fxfact.utils import no_reduced_precision


class JointConv(nn.Module):
    """Several convolutions of one shape that share a factorized tensor (Kossaifi et al. 2020).

    ``joint[i]``, or ``joint[i, j]``, is a convolution that shares it. Its stages are those of a ``FactorizedConv``, and
    one of them is a linear combination that is learnt for each convolution. The tensor has the modes (*layers, out, in,
    *kernel), as a tensor train (*layers, in, *kernel, out). The spatial modes of a Tucker tensor are kept whole.

    Args:
        in_channels: the input channels.
        out_channels: the output channels.
        kernel_size: the size of the dense kernels.
        stride: the stride, as the next three until ``set`` changes that of a convolution.
        padding: the padding, also 'same' or 'valid'.
        dilation: the dilation.
        bias: whether the convolutions have biases.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        n_layers: the number of convolutions, or a tuple: then they are indexed by as many ints.
        order: the number of spatial axes. Needed if ``kernel_size`` is an int.
        factorization: 'cp', 'tucker' or 'tt'.
        rank: an int, a tuple with an entry for each mode (Tucker may leave out the spatial ones), or a fraction of the
            parameters of all convolutions, which becomes a rank by TensorLy's rules.
        implementation: 'factorized' runs the stages one after the other, 'reconstructed' one dense convolution.
        device: the device of the parameters.
        dtype: their type.
        generator: draws the initial values.

    Attributes:
        factors: the factors of the tensor, in the order of its modes. A Tucker tensor has none for the spatial modes.
        core: the core of a Tucker tensor (*rank, *kernel), the gains of the components of a CP tensor, or None.
        bias: the biases (*layers, out), or None.

    Raises:
        SpecError, ArgumentError, ArgumentTypeError, RankError: as for ``FactorizedConv``.
    """

    core: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(  # noqa: PLR0917 (the positions of nn.Conv2d)
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        n_layers: int | Sequence[int],
        order: int | None = None,
        factorization: str = "cp",
        rank: RankSpec = "same",
        implementation: str = "factorized",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_generator(generator)
        spec = ConvSpec.parse(
            in_channels,
            out_channels,
            kernel_size,
            order=order,
            stride=stride,
            padding=padding,
            dilation=dilation,
            padding_mode=padding_mode,
            bias=bias,
        )
        layers = _parse_layers(n_layers)
        full = joint_rank(factorization, layers, spec, rank)
        like = torch.empty(0, device=device, dtype=dtype)
        tensors = empty_tensors(factorization, layers, spec, full, like)
        biases = like.new_zeros(*layers, out_channels) if bias else None
        names = {"factorization": factorization, "implementation": implementation}
        self._hold(layers, [spec] * math.prod(layers), tensors, biases, **names)
        self.reset_parameters(generator=generator)

    @classmethod
    @torch.inference_mode(False)
    def from_conv_list(
        cls,
        convs: Sequence[nn.Module],
        rank: RankSpec = "same",
        *,
        factorization: str = "cp",
        implementation: str = "factorized",
        decompose_weights: bool = True,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Return the joint layer of several convolutions.

        Args:
            convs: convolutions with weights of one shape, without groups and not transposed. Each keeps its stride,
                padding, dilation and bias. They are not changed.
            rank: as for the class.
            factorization: as for the class.
            implementation: as for the class.
            decompose_weights: whether to decompose the weights. If not, the layer has new initial values.
            generator: draws the initial values.

        Returns:
            The layer. ``joint[i]`` is in the place of ``convs[i]``.

        Raises:
            ArgumentTypeError: if one is no convolution.
            RefusedError: if they are of unlike shapes, or one has groups or is transposed.
            ArgumentError, RankError, WeightError: if another argument, the rank or a weight is invalid.
        """
        check_generator(generator)
        layers = [_read(k, conv) for k, conv in enumerate(convs)]
        if len(layers) < 2:
            raise ArgumentError(f"a joint layer is made of at least two convolutions, got {len(layers)}")
        shapes = [layer.spec.weight_shape for layer in layers]
        if other := next((k for k, shape in enumerate(shapes) if shape != shapes[0]), None):
            raise RefusedError(
                f"the convolutions of a joint layer have one shape, and number 0 has {shapes[0]}, number {other} "
                f"{shapes[other]}. Make a joint layer for each shape."
            )
        axes, first = (len(layers),), layers[0]
        full = joint_rank(factorization, axes, first.spec, rank)
        with torch.no_grad():
            kernel = torch.stack([layer.weight.detach() for layer in layers])
            tensors = (
                decompose_jointly(factorization, axes, first.spec, full, kernel)
                if decompose_weights
                else empty_tensors(factorization, axes, first.spec, full, kernel)
            )
            zeros = kernel.new_zeros(len(layers), first.spec.out_channels)
            for row, layer in zip(zeros, layers, strict=True):
                if layer.bias is not None:
                    row.copy_(layer.bias)
        bias = zeros if any(layer.spec.bias for layer in layers) else None
        names = {"factorization": factorization, "implementation": implementation}
        new = cls.holding(axes, [layer.spec for layer in layers], tensors, bias, **names)
        if not decompose_weights:
            new.reset_parameters(generator=generator)
        return new.train(convs[0].training)

    @classmethod
    def holding(
        cls, layers: Sizes, specs: Sequence[ConvSpec], tensors: JointTensors, bias: Tensor | None, **names: str
    ) -> Self:
        """Return the layer that holds a tensor.

        Args:
            layers: the numbers of convolutions.
            specs: the convolutions in order, the last index first.
            tensors: the core and the factors, which become parameters.
            bias: the biases (*layers, out), or None.
            names: the factorization and the implementation.

        Returns:
            The layer.
        """
        new = cls.__new__(cls)
        new._hold(layers, specs, tensors, bias, **names)
        return new

    def _hold(
        self,
        layers: Sizes,
        specs: Sequence[ConvSpec],
        tensors: JointTensors,
        bias: Tensor | None,
        *,
        factorization: str,
        implementation: str,
    ) -> None:
        if implementation not in ("factorized", "reconstructed"):
            raise ArgumentError(f"implementation is 'factorized' or 'reconstructed', got {implementation!r}")
        super().__init__()
        self.factorization, self.implementation = factorization.lower(), implementation
        self.n_layers, self._specs = layers, list(specs)
        core, factors = tensors
        self._chain_rank = chain_rank(self.factorization, tensors, len(layers))
        self.factors = nn.ParameterList(factors)
        self.register_parameter("core", None if core is None else nn.Parameter(core))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    @torch.no_grad()
    def reset_parameters(self, std: float | None = None, *, generator: torch.Generator | None = None) -> None:
        """Draw new values for the tensor, and set the biases to zero.

        Args:
            std: the standard deviation of the dense kernels, by default that of PyTorch's initialisation.
            generator: draws the values. None means PyTorch's global one.
        """
        spec = self._specs[0]
        std = 1 / math.sqrt(3 * math.prod(spec.weight_shape[1:])) if std is None else std
        parts = [*self.factors, *([self.core] if self.factorization == "tucker" and self.core is not None else [])]
        of_parts = (std / math.sqrt(self._terms())) ** (1 / len(parts))
        for part in parts:
            device = part.device if generator is None else generator.device
            drawn = torch.empty_like(part, device=device)
            part.copy_(drawn.normal_(0, of_parts, generator=generator))
        if self.core is not None and self.factorization == "cp":
            self.core.fill_(1)
        if self.bias is not None:
            self.bias.zero_()

    def _terms(self) -> int:
        """Return how many products are summed for a value of a dense kernel."""
        if self.factorization == "tt":
            return math.prod(factor.shape[2] for factor in self.factors)
        ranks = {"cp": self.factors[0].shape[1:], "tucker": [factor.shape[1] for factor in self.factors]}
        return math.prod(ranks[self.factorization])

    def __len__(self) -> int:
        return self.n_layers[0]

    def __iter__(self) -> Iterator[SharedConv]:
        if len(self.n_layers) > 1:
            raise ArgumentError(
                f"n_layers={self.n_layers}: index this layer by {len(self.n_layers)} ints, do not iterate."
            )
        return (self[k] for k in range(len(self)))

    def __getitem__(self, index: int | tuple[int, ...]) -> SharedConv:
        """Return the convolution at an index, which shares the parameters of this layer."""
        return SharedConv(self, self._parse_index(index))

    def _parse_index(self, index: int | Sequence[int]) -> Sizes:
        found = tuple(index) if isinstance(index, Sequence) else (index,)
        if len(found) != len(self.n_layers) or any(not -n <= i < n for i, n in zip(found, self.n_layers, strict=True)):
            error = ArgumentError if len(found) != len(self.n_layers) else IndexError
            raise error(f"this layer holds n_layers={self.n_layers} convolutions, got the index {index}")
        return tuple(i % n for i, n in zip(found, self.n_layers, strict=True))

    def set(self, index: int | Sequence[int], **settings: Any) -> None:
        """Set the stride, padding or dilation of one convolution, or its bias.

        Args:
            index: the index of the convolution.
            settings: stride, padding, dilation and padding_mode as ``nn.Conv2d`` takes them, and bias, a tensor (out,).

        Raises:
            ArgumentError: if a setting is not known, or the layer has no biases.
            SpecError: if the settings do not describe a convolution.
        """
        place, bias = self._parse_index(index), settings.pop("bias", None)
        spec = self.spec_at(place)
        names = ("stride", "padding", "dilation", "padding_mode")
        if unknown := [name for name in settings if name not in names]:
            raise ArgumentError(
                f"a convolution of a joint layer has the settings {names} and 'bias', got {unknown[0]!r}"
            )
        given = {name: getattr(spec, name) for name in names if name != "padding"} | settings
        parsed = ConvSpec.parse(spec.in_channels, spec.out_channels, spec.kernel_size, **given)
        padding = parsed.padding if "padding" in settings else spec.padding
        if bias is not None:
            if self.bias is None:
                raise ArgumentError("this layer has no biases. Make it with bias=True.")
            with torch.no_grad():
                self.bias[place].copy_(bias)
        changed = replace(parsed, padding=padding, bias=spec.bias or bias is not None)
        self._specs[self._flat(place)] = changed

    def _flat(self, index: Sizes) -> int:
        flat = 0
        for i, n in zip(index, self.n_layers, strict=True):
            flat = flat * n + i
        return flat

    def spec_at(self, index: int | Sequence[int]) -> ConvSpec:
        """Return the dense convolution at an index.

        Args:
            index: the index.

        Returns:
            Its spec.
        """
        return self._specs[self._flat(self._parse_index(index))]

    def chain_at(self, index: int | Sequence[int]) -> tuple[tuple[ConvSpec, ...], list[Tensor]]:
        """Return the stages of a convolution.

        Args:
            index: the index.

        Returns:
            The specs of its stages, and their weights (out, in / groups, *kernel).
        """
        place = self._parse_index(index)
        factors = [self.factors[k] for k in range(len(self.factors))]
        return joint_chain(self.factorization, self.spec_at(place), (self.core, factors), place, self._chain_rank)

    def forward(self, x: Tensor, index: int | Sequence[int]) -> Tensor:
        """Run one of the convolutions.

        Args:
            x: the input (batch, in, *size) or (in, *size).
            index: the index of the convolution.

        Returns:
            The output (batch, out, *size) or (out, *size).
        """
        place = self._parse_index(index)
        spec, (stages, weights) = self.spec_at(place), self.chain_at(place)
        bias = self.bias[place] if spec.bias and self.bias is not None else None
        if self.implementation == "reconstructed":
            return run_weight(spec, compose_weights(stages, weights), bias, x)
        for stage, weight in zip(stages[:-1], weights[:-1], strict=True):
            x = run_weight(stage, weight, None, x)
        return run_weight(stages[-1], weights[-1], bias, x)

    def kernel_at(self, index: int | Sequence[int]) -> Tensor:
        """Compose the dense kernel of a convolution.

        Args:
            index: the index.

        Returns:
            The kernel (out, in, *kernel).
        """
        stages, weights = self.chain_at(index)
        with no_reduced_precision(weights[0].device):
            return compose_weights(stages, weights)

    def extra_repr(self) -> str:
        """Describe the layer in ``repr``."""
        return (
            f"n_layers={self.n_layers}, {self._specs[0]}, {self.factorization}, implementation={self.implementation!r}"
        )


class SharedConv(ConvAttributes, nn.Module):
    """One convolution of a joint layer, whose parameters it shares.

    Args:
        joint: the joint layer.
        index: the index of the convolution.
    """

    def __init__(self, joint: JointConv, index: Sizes) -> None:
        super().__init__()
        self.joint, self.index = joint, index
        self.train(joint.training)

    @property
    def spec(self) -> ConvSpec:
        """The dense convolution that this layer replaces."""
        return self.joint.spec_at(self.index)

    @property
    def weight(self) -> Tensor:
        """The dense kernel (out, in, *kernel), composed at every access. What is written to it is lost."""
        return self.joint.kernel_at(self.index)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, *size) or (in, *size) to (batch, out, *size) or (out, *size).

        Args:
            x: the input.

        Returns:
            The output.
        """
        return cast(Tensor, self.joint(x, self.index))

    @torch.inference_mode(False)
    def to_conv(self) -> nn.Module:
        """Compose the layer to a dense convolution.

        Returns:
            A new ``nn.Conv…`` or ``ConvNd`` that computes the same and shares nothing.
        """
        bias = self.joint.bias[self.index].detach().clone() if self.spec.bias and self.joint.bias is not None else None
        weight = self.weight.detach().clone()
        conv = write_conv_module(self.spec, weight.requires_grad_(), None if bias is None else bias.requires_grad_())
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer in ``repr``."""
        return f"index={self.index}, {self.spec}"


def _parse_layers(n_layers: int | Sequence[int]) -> Sizes:
    layers = tuple(n_layers) if isinstance(n_layers, Sequence) else (n_layers,)
    if not layers or any(type(n) is not int or n < 1 for n in layers):
        raise ArgumentError(f"n_layers must be a positive int or a tuple of them, got {n_layers!r}")
    return layers


def _read(k: int, conv: nn.Module) -> ConvLayer:
    if not isinstance(conv, nn.Module) or not is_dense_conv(conv) or isinstance(conv, nn.Linear):
        raise ArgumentTypeError(
            f"convolution number {k} must be a torch.nn.Conv1d/2d/3d or ConvNd, got {type(conv).__name__}"
        )
    layer = read_conv(conv)
    if isinstance(layer, Skip):
        raise RefusedError(f"convolution number {k}: {layer.reason}")
    if layer.spec.groups > 1 or layer.spec.transposed:
        raise RefusedError(f"convolution number {k}, {layer.spec}, has groups or is transposed. Leave it out.")
    return layer
