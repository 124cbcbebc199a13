"""How a factorized layer is put together: a value, before there are any tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from fxfact.conv import (
    ConvSpec,
    Sizes,
    Skip,
    compose_modules,
    compose_weights,
    composed_spec,
    computes_weight,
    is_conv,
    read_conv,
    run_weight,
    write_chain,
    write_conv,
)
from fxfact.errors import ArgumentError, ArgumentTypeError, RefusedError
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

Implementation = Literal["factorized", "mobilenet", "reconstructed"]


@dataclass(frozen=True)
class Structure:
    """The dense convolution ``spec``, its factorization and rank, how it is computed, and the convolutions ``stages``
    that hold its parameters (computed once: a forward must not).
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
        """Understand names and ranks. 'cp' is CP over all modes, 'tucker' keeps both pointwise stages at any rank, and
        a fraction of the parameters becomes a rank by TensorLy's rules. Raises ArgumentError, RankError, RefusedError.
        """
        in_layers = {"cp": CPFactorized(), "tucker": Tucker(keep_full_sides=True)}
        method = in_layers.get(factorization.lower()) if isinstance(factorization, str) else None
        method = method or parse_factorization(factorization)
        offered = [n for n in get_args(Implementation) if n != "mobilenet" or isinstance(method, CPFactorized)]
        if implementation not in offered:
            raise ArgumentError(f"implementation of {method.name} is one of {offered}, got {implementation!r}")
        found = resolve_rank(method, spec, parse_rank_spec(rank), clip=False, rule="tensorly")
        if isinstance(found, Skip):
            raise RefusedError(f"{found.reason} ({spec})")
        stages = method.layout(spec, found)
        if implementation == "mobilenet":
            stages = (stages[0], composed_spec(stages[1:-1]), stages[-1])
        return cls(spec, method, found, implementation, stages)  # type: ignore[arg-type]

    def merged(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The decomposed weights as ``stages`` wants them: for 'mobilenet' the 1-D kernels become one."""
        if self.implementation != "mobilenet":
            return list(weights)
        space = self.factorization.layout(self.spec, self.rank)[1:-1]
        return [weights[0], compose_weights(space, weights[1:-1]), weights[-1]]


class FactorizedConv(nn.Module):
    """A convolution of any order (1 to 3) held as the stages of a factorization; takes what ``nn.Conv2d`` takes, and

    order: the number of spatial axes, needed where kernel_size is an int.
    factorization: 'cp' (over all modes), 'tucker' (both pointwise stages kept at any rank), 'tt', or any other name or
        object of ``fxfact.factorizations``.
    rank: an int, a tuple, or a fraction of the dense parameters ('same' is 1.0), which becomes a rank by TensorLy's
        rules (``tensorly.cp_tensor.validate_cp_rank`` and its siblings), the spatial modes of Tucker kept whole,
        clipped to what is feasible.
    implementation: 'factorized' runs the stages one after the other; 'mobilenet', for 'cp', with one depthwise
        k×k stage; 'reconstructed' composes the dense kernel in every forward and runs one dense convolution.
    generator: draws the initial values, whose output variance is that of the dense layer's own initialisation.

    Input (batch, in, *size) or (in, *size), output as of the dense convolution. Raises SpecError, ArgumentError,
    RankError, and RefusedError where this convolution cannot be factorized so.
    """

    default_factorization: ClassVar[str | None] = None

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
    @torch.inference_mode(False)  # whose tensors could never be trained
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
        """The layer for an ``nn.Conv1d/2d/3d``, with its device, dtype, mode and every attribute; the convolution and
        its bias are copied from, not shared. ``decompose_weights=False`` gives it the initial values of a new layer.

        Raises ArgumentTypeError for a module that is no convolution, RefusedError, RankError, WeightError.
        """
        if not isinstance(conv, nn.Module) or not is_conv(conv):
            raise ArgumentTypeError(f"conv must be a torch.nn.Conv1d, Conv2d or Conv3d, got {type(conv).__name__}")
        check_generator(generator)
        if computes_weight(conv):
            raise RefusedError(
                f"{type(conv).__name__}: its weight or bias is computed from other parameters. Make it "
                "one: torch.nn.utils.parametrize.remove_parametrizations(conv, 'weight')."
            )
        layer = read_conv(conv)
        if isinstance(layer, Skip):
            raise RefusedError(f"{type(conv).__name__}: {layer.reason}")
        structure = Structure.parse(layer.spec, cls._method(factorization), rank, implementation)
        weights = None
        if decompose_weights:
            chain = structure.factorization.decompose(layer, structure.rank, generator=generator)
            weights = structure.merged([stage.weight for stage in chain.layers])
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
            raise ArgumentError("factorization= is needed: 'cp', 'tucker', 'tt', or CPConv, TuckerConv, TTConv instead")
        return method

    def _assemble(
        self, structure: Structure, like: Tensor, bias: Tensor | None, weights: Sequence[Tensor] | None = None
    ) -> None:
        super().__init__()
        self._structure = structure
        values = weights or [like.new_empty(spec.weight_shape) for spec in structure.stages]
        modules = write_chain(structure.stages, values, bias, like=like)
        self.stages = nn.Sequential(*modules)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new values: every stage keeps the variance of its input, but the last, which lowers it to a third, as
        PyTorch's own initialisation of the dense convolution does (He et al. 2015 with a = √5).
        """
        convs, dense = self._convs(), self._structure.spec
        into, fan_in = math.prod(dense.weight_shape[1:]), _fan_in(dense)
        for conv, spec in zip(convs, self._structure.stages, strict=True):
            last = into / fan_in if conv is convs[-1] else 3.0
            _draw(conv.weight, math.sqrt(last / math.prod(spec.weight_shape[1:])), generator)
        if (bias := convs[-1].bias) is not None:
            _draw(bias, 1 / math.sqrt(fan_in), generator)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, *size) or (in, *size) to (batch, out, *size) or (out, *size)."""
        if self.implementation == "reconstructed":
            return run_weight(self._structure.spec, self.weight, self.bias, x)
        for stage in self.stages:
            x = stage(x)
        return x

    @torch.inference_mode(False)
    def to_conv(self) -> nn.Module:
        """A new dense ``nn.Conv1d/2d/3d`` that computes the same, with the device, dtype and mode of this layer."""
        own = self._convs()[0].weight
        with torch.no_grad(), no_reduced_precision(own.device):
            weight = self.weight.clone(memory_format=torch.contiguous_format).requires_grad_(own.requires_grad)
        bias = self.bias
        copied = None if bias is None else bias.detach().clone().requires_grad_(bias.requires_grad)
        (conv,) = write_conv(self._structure.spec, weight, copied)
        return conv.train(self.training)

    @property
    def weight(self) -> Tensor:
        """The dense kernel (out, in / groups, *kernel), composed at every access."""
        return compose_modules(self._structure.stages, self.stages)

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), which the last stage holds."""
        bias: Tensor | None = self._convs()[-1].bias
        return bias

    @property
    def factorization(self) -> Factorization:
        """How the kernel is factorized."""
        return self._structure.factorization

    @property
    def rank(self) -> Rank:
        """The rank, as the factorization counts it."""
        return self._structure.rank

    @property
    def implementation(self) -> Implementation:
        """'factorized', 'mobilenet' or 'reconstructed'."""
        return self._structure.implementation

    @property
    def spec(self) -> ConvSpec:
        """The dense convolution that this layer stands for."""
        return self._structure.spec

    @property
    def kernel_size(self) -> Sizes:
        """Of the dense convolution."""
        return self._structure.spec.kernel_size

    def extra_repr(self) -> str:
        """The dense convolution, the factorization, the rank."""
        return f"{self.spec}, {self.factorization.name}, rank={self.rank}, implementation={self.implementation!r}"

    def _convs(self) -> list[Any]:
        """The stages without the pad modules between them."""
        return [stage for stage in self.stages if is_conv(stage)]


def _fan_in(spec: ConvSpec) -> int:
    """What PyTorch takes for the inputs of one output, which of a transposed convolution are those of the mirrored."""
    channels = spec.out_channels if spec.transposed else spec.in_channels
    return channels // spec.groups * math.prod(spec.kernel_size)


@torch.no_grad()
def _draw(tensor: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """On the generator's own device."""
    drawn = torch.empty_like(tensor, device=tensor.device if generator is None else generator.device)
    tensor.copy_(drawn.uniform_(-bound, bound, generator=generator))


class CPConv(FactorizedConv):
    """``FactorizedConv`` with factorization='cp'."""

    default_factorization = "cp"


class TuckerConv(FactorizedConv):
    """``FactorizedConv`` with factorization='tucker'."""

    default_factorization = "tucker"


class TTConv(FactorizedConv):
    """``FactorizedConv`` with factorization='tt'."""

    default_factorization = "tt"
