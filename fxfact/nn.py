"""Factorized convolution layers to build models with, compatible with TensorLy-Torch's ``FactorizedConv``.

A layer holds the stages of a factorization, as ``nn.Conv`` modules, instead of a dense kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from fxfact.conv import (
    ComposedChain,
    ComposedLayer,
    ConvSpec,
    OwnParameters,
    Sizes,
    Skip,
    compose_weights,
    composed_spec,
    computes_weight,
    is_conv,
    read_conv,
    run_stages,
    run_weight,
    takes_output_size,
    write_chain,
    write_conv,
)
from fxfact.errors import ArgumentError, ArgumentTypeError, RefusedError, WeightError
from fxfact.factorizations import (
    CPFactorized,
    Factorization,
    Rank,
    RankSpec,
    Tucker,
    check_generator,
    parse_factorization,
    parse_rank_spec,
    resolve_rank,
)
from fxfact.utils import no_reduced_precision

__all__ = ["CPConv", "FactorizedConv", "Implementation", "TTConv", "TuckerConv"]

Implementation = Literal["factorized", "mobilenet", "reconstructed"]


@dataclass(frozen=True)
class Structure:
    """A factorized layer without its tensors.

    Attributes:
        spec: the dense convolution.
        factorization: how the kernel is factorized.
        rank: the rank of each group.
        implementation: how ``forward`` computes the layer.
        stages: the convolutions that hold the parameters. They are stored because ``forward`` must not compute them.
    """

    spec: ConvSpec
    factorization: Factorization
    rank: Rank
    implementation: Implementation
    stages: tuple[ConvSpec, ...]

    @classmethod
    def parse(
        cls,
        spec: ConvSpec,
        factorization: str | Factorization,
        rank: RankSpec,
        implementation: str,
    ) -> Structure:
        """Parse the arguments of a layer. Raises ArgumentError, RankError or RefusedError."""
        of_layers = {"cp": CPFactorized(), "tucker": Tucker(keep_full_sides=True)}
        method = of_layers.get(factorization.lower()) if isinstance(factorization, str) else None
        method = method or parse_factorization(factorization)
        allowed = [n for n in get_args(Implementation) if n != "mobilenet" or isinstance(method, CPFactorized)]
        if implementation not in allowed:
            raise ArgumentError(f"implementation of {method.name} is one of {allowed}, got {implementation!r}")
        resolved = resolve_rank(method, spec, parse_rank_spec(rank), clip=False, rule="tensorly")
        if isinstance(resolved, Skip):
            raise RefusedError(f"{resolved.reason} ({spec})")
        stages = method.layout(spec, resolved)
        if implementation == "mobilenet":
            stages = (stages[0], composed_spec(stages[1:-1]), stages[-1])
        return cls(spec, method, resolved, implementation, stages)  # type: ignore[arg-type]

    def stage_weights(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the weights of ``stages`` for those of the chain: 'mobilenet' composes the 1-D kernels into one."""
        if self.implementation != "mobilenet":
            return list(weights)
        space = self.factorization.layout(self.spec, self.rank)[1:-1]
        return [weights[0], compose_weights(space, weights[1:-1]), weights[-1]]


class FactorizedConv(ComposedLayer):
    """A convolution with 1 to 3 spatial axes, held as the stages of a factorization.

    Input (batch, in, *size) or (in, *size), output (batch, out, *size) or (out, *size), as for ``nn.Conv2d``, whose
    arguments come first. The initial values give the output the variance of the dense layer's initialisation.

    Args:
        in_channels: the input channels.
        out_channels: the output channels.
        kernel_size: the size of the dense kernel.
        stride: the stride.
        padding: the padding, also 'same' or 'valid'.
        dilation: the dilation.
        groups: the groups, each of which is factorized.
        bias: whether the last stage has a bias.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        order: the number of spatial axes. Needed if ``kernel_size`` is an int.
        factorization: 'cp' (one stage for each axis), 'tucker' (both pointwise stages at any rank), 'tt', or another
            name or object of ``fxfact.factorizations``. Needed unless the class has a default.
        rank: an int, a tuple, or a fraction of the dense parameters ('same' means 1.0). TensorLy's rules
            (``tensorly.cp_tensor.validate_cp_rank`` and similar) turn a fraction into a rank, which is then clipped to
            a feasible one. Tucker's spatial modes are kept whole.
        implementation: 'factorized' runs the stages one after the other. 'mobilenet', for 'cp' only, has one depthwise
            k×k stage. 'reconstructed' composes the dense kernel in every forward and runs one dense convolution.
        device: the device of the parameters.
        dtype: their type.
        generator: draws the initial values.

    Raises:
        SpecError: if the arguments do not describe a convolution.
        ArgumentError: if the factorization, implementation or dtype is invalid.
        ArgumentTypeError: if the factorization, rank or generator is of a wrong type.
        RankError: if the rank is invalid.
        RefusedError: if the convolution cannot be factorized this way.
    """

    default_factorization: ClassVar[str | None] = None
    _weight_in_torch_layout = False

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
        factorization: str | Factorization | None = None,
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
            groups=groups,
            padding_mode=padding_mode,
            bias=bias,
        )
        structure = Structure.parse(spec, self._method(factorization), rank, implementation)
        like = torch.empty(0, device=device, dtype=dtype)
        if not like.dtype.is_floating_point:
            raise ArgumentError(f"dtype must be a real floating-point type, got {like.dtype}")
        like.requires_grad_()
        self._assemble(structure, like, like.new_empty(out_channels).requires_grad_() if bias else None)
        self.reset_parameters(generator)

    @classmethod
    @torch.inference_mode(False)  # inference tensors cannot be trained
    def from_conv(
        cls,
        conv: nn.Module,
        rank: RankSpec = "same",
        *,
        factorization: str | Factorization | None = None,
        implementation: str = "factorized",
        decompose_weights: bool = True,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Return the factorized layer for a convolution.

        Args:
            conv: an ``nn.Conv1d/2d/3d`` or ``nn.ConvTranspose1d/2d/3d``. It is not changed, and shares no tensor with
                the layer, which has its device, dtype, mode and attributes.
            rank: as for the class.
            factorization: as for the class.
            implementation: as for the class.
            decompose_weights: whether to decompose the weight. If not, the layer has the initial values of a new one.
            generator: draws the initial values, or the start of a factorization that starts at random.

        Returns:
            The layer.

        Raises:
            ArgumentTypeError: if ``conv`` is not a convolution.
            RefusedError: if it cannot be factorized this way, or computes its weight from other parameters.
            ArgumentError, RankError, WeightError: if another argument, the rank or the weight is invalid.
        """
        if not isinstance(conv, nn.Module) or not is_conv(conv) or isinstance(conv, nn.Linear):
            kinds = "torch.nn.Conv1d/2d/3d or ConvTranspose1d/2d/3d"
            raise ArgumentTypeError(f"conv must be a {kinds}, got {type(conv).__name__}")
        check_generator(generator)
        if computes_weight(conv):
            raise RefusedError(
                f"{type(conv).__name__}: its weight or bias is computed from other parameters. Replace them by a "
                "parameter: torch.nn.utils.parametrize.remove_parametrizations(conv, 'weight')."
            )
        layer = read_conv(conv)
        if isinstance(layer, Skip):
            raise RefusedError(f"{type(conv).__name__}: {layer.reason}")
        structure = Structure.parse(layer.spec, cls._method(factorization), rank, implementation)
        weights = None
        if decompose_weights and layer.weight.is_meta:
            raise WeightError("the weight is on the meta device and has no values. Pass decompose_weights=False.")
        if decompose_weights:
            chain = structure.factorization.decompose(layer, structure.rank, generator=generator)
            weights = structure.stage_weights([stage.weight for stage in chain.layers])
        new = cls.__new__(cls)
        bias = None if layer.bias is None else layer.bias.detach().clone().requires_grad_(layer.bias.requires_grad)
        new._assemble(structure, cast(Tensor, conv.weight), bias, weights)
        if not decompose_weights:
            new.reset_parameters(generator)
        return new.train(conv.training)

    @classmethod
    def _method(cls, factorization: str | Factorization | None) -> str | Factorization:
        method = cls.default_factorization if factorization is None else factorization
        if method is None:
            raise ArgumentError(
                "factorization= is needed. Pass 'cp', 'tucker' or 'tt', or use CPConv, TuckerConv, TTConv."
            )
        return method

    def _assemble(
        self, structure: Structure, like: Tensor, bias: Tensor | None, weights: Sequence[Tensor] | None = None
    ) -> None:
        super().__init__()
        vars(self)["_parameters"] = OwnParameters(self, {})
        self._structure = structure
        values = weights or [like.new_empty(spec.weight_shape) for spec in structure.stages]
        modules = write_chain(structure.stages, values, bias, like=like)
        self.stages = nn.Sequential(*modules)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new values for all parameters.

        Every stage preserves the variance of its input, except that the last one reduces it to a third, as PyTorch's
        initialisation of the dense convolution does (He et al. 2015 with a = √5).

        Args:
            generator: draws the values. None means PyTorch's global one.
        """
        convs, dense = self._convs(), self._structure.spec
        inputs, fan_in = math.prod(dense.weight_shape[1:]), _fan_in(dense)
        for conv, spec in zip(convs, self._structure.stages, strict=True):
            gain = inputs / fan_in if conv is convs[-1] else 3.0
            _draw(conv.weight, math.sqrt(gain / math.prod(spec.weight_shape[1:])), generator)
        if (bias := convs[-1].bias) is not None:
            _draw(bias, 1 / math.sqrt(fan_in), generator)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Map (batch, in, *size) or (in, *size) to (batch, out, *size) or (out, *size).

        Args:
            x: the input.
            output_size: the size of the output, as the forward of ``nn.ConvTranspose2d`` takes it. Only for layers that
                ``from_conv`` made of a transposed convolution.
        """
        spec = self._structure.spec
        if self.implementation != "reconstructed":
            return run_stages(self.stages, spec, x, output_size)
        if takes_output_size(output_size, spec):
            spec = spec.for_output_size(tuple(x.shape[-spec.order :]), output_size)
        return run_weight(spec, self._composed(), self.bias, x)

    @torch.inference_mode(False)
    def to_conv(self) -> nn.Module:
        """Compose the layer to a dense convolution.

        Returns:
            A new ``nn.Conv…`` or ``nn.ConvTranspose…`` that computes the same, with the device, dtype and training mode
            of this layer.
        """
        like = self._convs()[0].weight
        with torch.no_grad(), no_reduced_precision(like.device):
            weight = self._composed().clone(memory_format=torch.contiguous_format)
        bias = self.bias
        copied = None if bias is None else bias.detach().clone().requires_grad_(bias.requires_grad)
        (conv,) = write_conv(self._structure.spec, weight.requires_grad_(like.requires_grad), copied)
        return conv.train(self.training)

    @property
    def factorization(self) -> Factorization:
        """The factorization of the kernel."""
        return self._structure.factorization

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
    def kernel_size(self) -> Sizes:
        """The kernel size of the dense convolution."""
        return self._structure.spec.kernel_size

    def extra_repr(self) -> str:
        """Describe the layer in ``repr``."""
        return f"{self.spec}, {self.factorization.name}, rank={self.rank}, implementation={self.implementation!r}"

    def _convs(self) -> list[Any]:
        """Return the stages without the padding modules between them."""
        return list(self._chain().convs.values())

    def _chain(self) -> ComposedChain:
        convs = {f"stages.{name}": stage for name, stage in self.stages.named_children() if is_conv(stage)}
        return ComposedChain(self._structure.spec, self._structure.stages, convs)

    def _has_bias(self, bias: bool) -> None:
        before = self._structure
        stages = (*before.stages[:-1], replace(before.stages[-1], bias=bias))
        self._structure = replace(before, spec=replace(before.spec, bias=bias), stages=stages)


def _fan_in(spec: ConvSpec) -> int:
    """Return the fan-in that PyTorch computes. For a transposed convolution it is that of the mirrored one."""
    channels = spec.out_channels if spec.transposed else spec.in_channels
    return channels // spec.groups * math.prod(spec.kernel_size)


@torch.no_grad()
def _draw(tensor: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fill a tensor with uniform values within ±bound, drawn on the device of the generator."""
    drawn = torch.empty_like(tensor, device=tensor.device if generator is None else generator.device)
    tensor.copy_(drawn.uniform_(-bound, bound, generator=generator))


class CPConv(FactorizedConv):
    """``FactorizedConv`` with factorization='cp' (Lebedev et al. 2015): 1×1 → depthwise k×1 → depthwise 1×k → 1×1."""

    default_factorization = "cp"


class TuckerConv(FactorizedConv):
    """``FactorizedConv`` with factorization='tucker' (Kim et al. 2016): 1×1 → k×k → 1×1."""

    default_factorization = "tucker"


class TTConv(FactorizedConv):
    """``FactorizedConv`` with factorization='tt' (tensor train, Oseledets 2011): 1×1 → k×1 → 1×k → 1×1."""

    default_factorization = "tt"
