"""The factorized layers of one convolution: FactorizedConv, and its classes for CP, Tucker and TT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from fxfact.conv import ConvSpec, Skip, computes_weight, read_conv
from fxfact.errors import ArgumentError, ArgumentTypeError, RefusedError, WeightError
from fxfact.factorizations import Factorization, RankSpec, check_generator
from fxfact.nn.factors import FactorizedTensor, read_factors
from fxfact.nn.joint import JointConv
from fxfact.nn.rank_gains import RankDropout, RankLasso, rank_stages
from fxfact.nn.staged_conv import StagedConv, is_dense_conv
from fxfact.nn.structure import FixedRankModes, Structure, with_options


class FactorizedConv(StagedConv):
    """A convolution with any number of spatial axes, held as the stages of a factorization.

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
            a feasible one. Tucker's spatial modes are kept whole. A tuple may have TensorLy's form as well: for Tucker
            one entry for each mode, (out, in, *kernel), for TT the ranks with a 1 at both ends.
        implementation: 'factorized' runs the stages one after the other. 'mobilenet', for 'cp' only, has one depthwise
            k×k stage. 'reconstructed' composes the dense kernel in every forward and runs one dense convolution.
        fixed_rank_modes: for 'tucker', the modes whose rank is their size: 0 (out), 1 (in), or spatial ones, which
            always are whole. 'spatial' therefore means no other modes.
        tensor_dropout: the probability with which rank indices are dropped while training. See
            ``fxfact.nn.tensor_dropout``, which also adds it later, with more options.
        tensor_lasso: whether rank indices have gains to train. See ``fxfact.nn.tensor_lasso``.
        device: the device of the parameters.
        dtype: their type.
        generator: draws the initial values.

    Raises:
        SpecError: if the arguments do not describe a convolution.
        ArgumentError: if the factorization, implementation or dtype is invalid, or a kernel is larger than the memory.
        ArgumentTypeError: if the factorization, rank or generator is of a wrong type.
        RankError: if the rank is invalid.
        RefusedError: if the convolution cannot be factorized this way.
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
        fixed_rank_modes: FixedRankModes = None,
        tensor_dropout: float = 0.0,
        tensor_lasso: bool = False,
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
        structure = Structure.parse(spec, self._method(factorization), rank, implementation, fixed_rank_modes)
        dropout = RankDropout(tensor_dropout, min_dim=3, min_values=1, drop_test=False)
        like = torch.empty(0, device=device, dtype=dtype)
        if not like.dtype.is_floating_point:
            raise ArgumentError(f"dtype must be a real floating-point type, got {like.dtype}")
        like.requires_grad_()
        self._assemble(structure, like, like.new_empty(out_channels).requires_grad_() if bias else None)
        self.rank_dropout = dropout if tensor_dropout else None
        self.rank_lasso = (
            RankLasso(rank_stages(structure), like, clamp_weights=True, threshold=1e-6) if tensor_lasso else None
        )
        self.reset_parameters(generator=generator)

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
        decomposition_kwargs: Mapping[str, Any] | None = None,
        fixed_rank_modes: FixedRankModes = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Return the factorized layer for a convolution.

        Args:
            conv: an ``nn.Conv1d/2d/3d``, ``nn.ConvTranspose1d/2d/3d`` or ``ConvNd``. It is not changed, and shares no
                tensor with the layer, which has its device, dtype, mode and attributes.
            rank: as for the class.
            factorization: as for the class.
            implementation: as for the class.
            decompose_weights: whether to decompose the weight. If not, the layer has the initial values of a new one.
            decomposition_kwargs: options of the factorization, such as ``{"sweeps": 100}``. TensorLy's names
                n_iter_max, tol and random_state are known as well.
            fixed_rank_modes: as for the class.
            generator: draws the initial values, or the start of a factorization that starts at random.

        Returns:
            The layer.

        Raises:
            ArgumentTypeError: if ``conv`` is not a convolution.
            RefusedError: if it cannot be factorized this way, or computes its weight from other parameters.
            ArgumentError, RankError, WeightError: if another argument, the rank or the weight is invalid.
        """
        is_dense = isinstance(conv, nn.Module) and is_dense_conv(conv) and not isinstance(conv, nn.Linear)
        if not is_dense:
            kinds = "torch.nn.Conv1d/2d/3d, ConvTranspose1d/2d/3d or fxfact.nn.ConvNd"
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
        method, generator = with_options(cls._method(factorization), decomposition_kwargs, generator)
        structure = Structure.parse(layer.spec, method, rank, implementation, fixed_rank_modes)
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
            new.reset_parameters(generator=generator)
        return new.train(conv.training)

    @classmethod
    def from_conv_list(cls, convs: Sequence[nn.Module], rank: RankSpec = "same", **options: Any) -> JointConv:
        """Return a joint layer, in which several convolutions share one factorized tensor.

        Args:
            convs: the convolutions, with weights of one shape.
            rank: the rank of the joint tensor.
            options: the other arguments of ``JointConv.from_conv_list``.

        Returns:
            The layer. ``joint[i]`` is in the place of ``convs[i]``.

        Raises:
            ArgumentTypeError, RefusedError, ArgumentError, RankError, WeightError: as ``JointConv.from_conv_list``.
        """
        factorization = options.pop("factorization", None) or cls.default_factorization or "cp"
        return JointConv.from_conv_list(convs, rank, factorization=factorization, **options)

    @classmethod
    @torch.inference_mode(False)
    def from_factors(
        cls,
        factors: FactorizedTensor,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: Tensor | None = None,
        padding_mode: str = "zeros",
        implementation: str = "factorized",
        kernel_size: Sequence[int] | None = None,
    ) -> Self:
        """Return the layer of a factorized kernel.

        Args:
            factors: a ``CPTensor`` or ``TuckerTensor`` of TensorLy with the modes (out, in, *kernel), or a ``TTTensor``
                with the modes (in, *kernel, out). Its tensors are copied. A rank that is larger than a chain can use is
                lowered, which is exact. Tucker's spatial factors are multiplied with the core.
            stride: the stride.
            padding: the padding, also 'same' or 'valid'.
            dilation: the dilation.
            bias: the bias (out,), which is copied, or None.
            padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
            implementation: as for the class.
            kernel_size: of a CP tensor (out, in, positions) that has all spatial axes in one mode.

        Returns:
            The layer, with the device and dtype of the factors.

        Raises:
            ArgumentTypeError: if ``factors`` is no factorized tensor, or of another factorization than the class.
            ArgumentError: if its modes are not those of a convolution, or the implementation is invalid.
            SpecError: if the other arguments do not describe a convolution.
        """
        read = read_factors(factors, None if kernel_size is None else tuple(kernel_size))
        if cls.default_factorization and cls.default_factorization not in read.factorization.name:
            raise ArgumentTypeError(
                f"{cls.__name__} takes the factors of {cls.default_factorization}, got a {type(factors).__name__}. "
                "Call FactorizedConv.from_factors, which takes any."
            )
        out_channels, in_channels, *kernel = read.kernel_shape
        spec = ConvSpec.parse(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            padding_mode=padding_mode,
            bias=bias is not None,
        )
        structure, weights = read.fit(spec, implementation)
        new = cls.__new__(cls)
        copies = [weight.detach().clone() for weight in weights]
        own_bias = None if bias is None else bias.detach().clone().requires_grad_()
        new._assemble(structure, torch.empty_like(copies[0]).requires_grad_(), own_bias, copies)
        return new

    @classmethod
    def _method(cls, factorization: str | Factorization | None) -> str | Factorization:
        method = cls.default_factorization if factorization is None else factorization
        if method is None:
            raise ArgumentError(
                "factorization= is needed. Pass 'cp', 'tucker' or 'tt', or use CPConv, TuckerConv, TTConv."
            )
        return method

    def reset_parameters(self, std: float | None = None, *, generator: torch.Generator | None = None) -> None:
        """Draw new values for all parameters.

        Without ``std`` every stage preserves the variance of its input, except that the last one reduces it to a third,
        as PyTorch's initialisation of the dense convolution does (He et al. 2015 with a = √5).

        Args:
            std: the standard deviation of the composed kernel, as TensorLy-Torch defines the initialisation: the values
                of all stages have the same normal distribution, and the bias is zero.
            generator: draws the values. None means PyTorch's global one.

        Raises:
            ArgumentError: if ``std`` is not a positive number.
        """
        if std is not None:
            self._draw_with_std(std, generator)
            return
        convs, dense = self._convs(), self._structure.spec
        inputs, fan_in = math.prod(dense.weight_shape[1:]), _fan_in(dense)
        for conv, spec in zip(convs, self._structure.stages, strict=True):
            gain = inputs / fan_in if conv is convs[-1] else 3.0
            _draw(conv.weight, math.sqrt(gain / math.prod(spec.weight_shape[1:])), generator)
        if (bias := convs[-1].bias) is not None:
            _draw(bias, 1 / math.sqrt(fan_in), generator)

    @torch.no_grad()
    def _draw_with_std(self, std: float, generator: torch.Generator | None) -> None:
        if isinstance(std, bool) or not isinstance(std, int | float) or not 0 < std < math.inf:
            raise ArgumentError(f"std must be a positive number, got {std!r}. Pass generator= by its name.")
        convs, stages = self._convs(), self._structure.stages
        terms = math.prod(stage.weight_shape[1] for stage in stages[1:])  # that are summed for a value of the kernel
        of_stages = (std / math.sqrt(terms)) ** (1 / len(stages))
        for conv in convs:
            device = conv.weight.device if generator is None else generator.device
            drawn = torch.empty_like(conv.weight, device=device)
            conv.weight.copy_(drawn.normal_(0, of_stages, generator=generator))
        if (bias := convs[-1].bias) is not None:
            bias.zero_()


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
