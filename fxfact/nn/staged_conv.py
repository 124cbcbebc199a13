"""The base of factorized layers: a module that holds the stages of one convolution, and runs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fxfact.conv import (
    ComposedChain,
    ComposedLayer,
    ConvAttributes,
    ConvNd,
    ConvSpec,
    OwnParameters,
    compose_weights,
    from_torch,
    is_conv,
    run_stages,
    run_weight,
    takes_output_size,
    to_torch,
    write_chain,
    write_conv_module,
)
from fxfact.factorizations import Factorization, Rank
from fxfact.nn.factors import FactorizedTensor, factors_of
from fxfact.nn.rank_gains import RankDropout, RankLasso, rank_stages
from fxfact.nn.structure import Implementation, Structure
from fxfact.nn.transduction import spec_with_axis, stages_with_axis
from fxfact.utils import check_memory, no_reduced_precision


class StagedConv(ConvAttributes, ComposedLayer):
    """A convolution held as the stages of a factorization."""

    rank_dropout: RankDropout | None
    rank_lasso: RankLasso | None
    _weight_in_torch_layout = False

    def _assemble(
        self, structure: Structure, like: Tensor, bias: Tensor | None, weights: Sequence[Tensor] | None = None
    ) -> None:
        super().__init__()
        dense = structure.spec if structure.implementation == "reconstructed" else None
        for spec in (*structure.stages, *filter(None, [dense])):
            check_memory(f"the kernel of {spec}", math.prod(spec.weight_shape), like)
        vars(self)["_parameters"] = OwnParameters(self, {})
        self._structure = structure
        self.rank_dropout = self.rank_lasso = None
        values = weights or [like.new_empty(spec.weight_shape) for spec in structure.stages]
        modules = write_chain(structure.stages, values, bias, like=like)
        self.stages = nn.Sequential(*modules)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Map (batch, in, *size) or (in, *size) to (batch, out, *size) or (out, *size).

        Args:
            x: the input.
            output_size: the size of the output, as the forward of ``nn.ConvTranspose2d`` takes it. Only for layers that
                ``from_conv`` made of a transposed convolution.
        """
        spec, gains = self._structure.spec, self._gains()
        if self.implementation != "reconstructed":
            return run_stages(self._scaled_stages(gains) if gains else self.stages, spec, x, output_size)
        if takes_output_size(output_size, spec):
            spec = spec.for_output_size(tuple(x.shape[-spec.order :]), output_size)
        return run_weight(spec, compose_weights(self._structure.stages, self.stage_weights(gains)), self.bias, x)

    def _gains(self) -> dict[int, Tensor]:
        """Return the gains of rank indices for one forward, by the stage whose output channels they are."""
        gains = self._lasso_gains()
        if self.rank_dropout is None:
            return gains
        stages, convs, groups = self._structure.stages, self._convs(), self._structure.spec.groups
        for k, size in rank_stages(self._structure).items():
            like = from_torch(stages[k], convs[k].weight).flatten(1)[:size, 0]
            dropped = self.rank_dropout(size, like)
            if dropped is not None:
                gains[k] = dropped.repeat(groups) * gains.get(k, 1)
        return gains

    def _lasso_gains(self) -> dict[int, Tensor]:
        if self.rank_lasso is None:
            return {}
        return {k: self.rank_lasso(k).repeat(self._structure.spec.groups) for k in rank_stages(self._structure)}

    def _scaled_stages(self, gains: Mapping[int, Tensor]) -> list[Callable[..., Tensor]]:
        """Return the modules of the stages, and after a stage with gains a function that multiplies its channels."""
        scaled: list[Callable[..., Tensor]] = []
        convs = self._convs()
        for module in self.stages:
            scaled.append(module)
            for k, gain in gains.items():
                if convs[k] is module:
                    scaled.append(gain.reshape(-1, *[1] * self._structure.spec.order).mul)
        return scaled

    def stage_weights(self, gains: Mapping[int, Tensor] | None = None) -> list[Tensor]:
        """Return the weights of the stages, multiplied with the gains of rank indices.

        Args:
            gains: the gains, by the stage whose output channels they are. None means those of the lasso.

        Returns:
            The weights (out, in / groups, *kernel) of ``stage_names``, with their gradients.
        """
        gains = self._lasso_gains() if gains is None else gains
        weights = []
        for k, (spec, conv) in enumerate(zip(self._structure.stages, self._convs(), strict=True)):
            weight = from_torch(spec, conv.weight)
            weights.append(weight * gains[k].reshape(-1, *[1] * (spec.order + 1)) if k in gains else weight)
        return weights

    def _composed(self) -> Tensor:
        return compose_weights(self._structure.stages, self.stage_weights())

    @torch.no_grad()
    def absorb_lasso(self) -> None:
        """Multiply the weights of the stages with the gains of the lasso, and remove it, which changes no result."""
        weights = self.stage_weights()
        for spec, conv, weight in zip(self._structure.stages, self._convs(), weights, strict=True):
            conv.weight.copy_(to_torch(spec, weight))
        self.rank_lasso = None

    def with_stages(self, structure: Structure, weights: Sequence[Tensor]) -> Self:
        """Return a layer of the same class with other stages, and with copies of this layer's bias and modes.

        Args:
            structure: the layer without its tensors.
            weights: the weights of its stages (out, in / groups, *kernel), which are copied.

        Returns:
            The layer.
        """
        like, bias = self._convs()[0].weight, self.bias
        new = type(self).__new__(type(self))
        own_bias = None if bias is None else bias.detach().clone().requires_grad_(bias.requires_grad)
        new._assemble(structure, like, own_bias, [weight.detach().clone() for weight in weights])
        return new.train(self.training)

    @torch.inference_mode(False)
    def to_conv(self) -> nn.Module:
        """Compose the layer to a dense convolution.

        Returns:
            A new ``nn.Conv…``, ``nn.ConvTranspose…``, or with more than three axes ``ConvNd``, that computes the same.
            It has the device, dtype and training mode of this layer. Uneven padding along an axis that ``transduct``
            added needs a pad module before it, in an ``nn.Sequential``.

        Raises:
            ArgumentError: if the kernel is larger than the memory of the device.
        """
        like = self._convs()[0].weight
        check_memory(f"the kernel of {self.spec}", math.prod(self.spec.weight_shape), like)
        with torch.no_grad(), no_reduced_precision(like.device):
            weight = self._composed().clone(memory_format=torch.contiguous_format)
        bias = self.bias
        copied = None if bias is None else bias.detach().clone().requires_grad_(bias.requires_grad)
        conv = write_conv_module(self._structure.spec, weight.requires_grad_(like.requires_grad), copied)
        return conv.train(self.training)

    @torch.no_grad()
    def transduct(
        self,
        kernel_size: int,
        axis: int = 0,
        *,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        train_all: bool = True,
    ) -> Self:
        """Return a layer with one more spatial axis, such as time: a layer for images becomes one for videos.

        At first the kernel is zero but at the center of the new axis, so that the layer maps every frame as this one
        does. CP and TT get one more stage. In a Tucker layer, and with 'mobilenet', a stage gets one more axis.

        Args:
            kernel_size: the size of the kernel along the new axis.
            axis: the position of the new axis among the spatial ones: 0 is before all of them.
            stride: the stride along the new axis.
            padding: the padding along the new axis. None means that which keeps the number of frames.
            dilation: the dilation along the new axis.
            train_all: whether all parameters are trained, or only the stage with the new axis.

        Returns:
            The layer, which shares no tensor with this one.

        Raises:
            ArgumentError: if an argument is out of its range, or the padding of a transposed layer would be uneven.
            RefusedError: if the factorization has no transduction.
        """
        before = self._structure
        spec = spec_with_axis(before.spec, axis, kernel_size, stride=stride, padding=padding, dilation=dilation)
        structure, weights, stage = stages_with_axis(before, self.stage_weights(), spec, axis)
        new = self.with_stages(structure, weights)
        if not train_all:
            new.requires_grad_(False)
            new._convs()[stage].weight.requires_grad_(True)
        return new

    @property
    def factorization(self) -> Factorization:
        """The factorization of the kernel."""
        return self._structure.factorization

    @property
    def structure(self) -> Structure:
        """The layer without its tensors."""
        return self._structure

    @property
    def rank(self) -> Rank:
        """The rank of each group."""
        return self._structure.rank

    @property
    def implementation(self) -> Implementation:
        """How ``forward`` computes the layer: 'factorized', 'mobilenet' or 'reconstructed'."""
        return self._structure.implementation

    @property
    def spec(self) -> ConvSpec:
        """The dense convolution that this layer replaces."""
        return self._structure.spec

    @property
    def factors(self) -> FactorizedTensor:
        """The kernel as a ``CPTensor``, ``TuckerTensor`` or ``TTTensor`` of TensorLy, made at every access.

        Its factors are views of the weights of the stages: what is written to them under ``torch.no_grad()`` changes
        the layer. With a lasso they are multiplied with its gains, and no views. With 'mobilenet', and with
        'cp_mobilenet', all spatial axes are in one mode. Raises RefusedError for a layer with groups, and for a
        factorization that TensorLy does not have.
        """
        return factors_of(self._structure, self.stage_weights())

    @property
    def stage_names(self) -> list[str]:
        """The names of the convolutions that the layer runs, such as 'stages.0', in order."""
        return list(self._chain().convs)

    def extra_repr(self) -> str:
        """Describe the layer in ``repr``."""
        return f"{self.spec}, {self.factorization.name}, rank={self.rank}, implementation={self.implementation!r}"

    def _convs(self) -> list[Any]:
        """Return the stages without the padding modules between them."""
        return list(self._chain().convs.values())

    def _chain(self) -> ComposedChain:
        convs = {f"stages.{name}": stage for name, stage in self.stages.named_children() if is_dense_conv(stage)}
        return ComposedChain(self._structure.spec, self._structure.stages, convs)

    def _has_bias(self, bias: bool) -> None:
        self._structure = self._structure.with_bias(bias)


def is_dense_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution of any order, or a linear layer."""
    return isinstance(module, ConvNd) or is_conv(module)
