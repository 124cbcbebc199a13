"""The base class of all factorizations."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from fxfact.conv import ConvChain, ConvLayer, ConvSpec, KroneckerFisher, compose
from fxfact.errors import ArgumentTypeError, WeightError
from fxfact.factorizations.balance import balance_stages
from fxfact.factorizations.fit import decompose_in_metric
from fxfact.factorizations.linalg import squared_singular_values
from fxfact.factorizations.stages import ChainLayout, Rank, one_group
from fxfact.utils import no_reduced_precision

_FIT_ITERATIONS = 200  # for weights that will be used
_HALF = (torch.float16, torch.bfloat16)
_ESTIMATE_ITERATIONS = 12  # for the loss increases that a plan is made from


@dataclass(frozen=True, kw_only=True)
class Factorization(ChainLayout):
    """A way to replace a convolution by a chain of cheaper convolutions.

    To add one of your own, subclass it as a frozen dataclass whose fields are its options: JSON values with defaults.
    Set ``name``, and override four hooks. They see one group at a time: ``block`` is a convolution with ``groups=1``
    and without bias, and ``weight`` is its kernel (out, in, *kernel).

    - ``_rejects(block)`` returns why a convolution cannot be factorized, or None.
    - ``_max_rank(block)`` returns the largest useful rank, a tuple of ints.
    - ``_stages(block, rank)`` returns the stages of the chain, all without bias. ``pointwise`` and ``stages_along``
      make the usual ones.
    - ``_weights(block, weight, rank, generator)`` returns the weights of the stages.

    The base class adds the rest: groups, biases, data types, the scale of the stages, ranks for a fraction of the
    parameters, and weights that are close in a Fisher metric. These laws must hold:

    - ``decompose(layer, rank)`` has the stages that ``layout(layer.spec, rank)`` returns.
    - The stages map every input size to the output size of the convolution.
    - At ``max_rank`` the composed chain equals the kernel, up to rounding.

    The other hooks have defaults. Override

    - ``_weights_in_metric`` and ``_loss_increases`` if there is a closed form,
    - ``_unfoldings`` if each entry of the rank bounds the rank of a matrix, or ``_spectra`` if other values bound the
      error,
    - ``_fast_variant`` if estimates can be cheaper than decompositions,
    - ``_feasible_rank`` if the entries of a rank bound each other,
    - ``_tensorly_rank`` if TensorLy has a rule for a fraction of the parameters.

    Attributes:
        name: the name in plans, reports and files.
        factorizes_linear: whether it factorizes linear layers, blocks without spatial axes. Otherwise it rejects them
            without a call of ``_rejects``.
    """

    @abstractmethod
    def _weights(
        self, block: ConvSpec, weight: Tensor, rank: Rank, generator: torch.Generator | None
    ) -> Sequence[Tensor]:
        """Return the weights of the stages, such that the chain is close to ``weight`` in the Frobenius norm.

        ``weight`` is in single or double precision. Each returned tensor holds the elements of one stage's weight (out,
        in / groups, *kernel) in order. It may have another shape.
        """

    def _weights_in_metric(
        self,
        block: ConvSpec,
        weight: Tensor,
        rank: Rank,
        *,
        metric: KroneckerFisher,
        generator: torch.Generator | None,
        iterations: int,
    ) -> Sequence[Tensor]:
        """Return weights that are close in a Fisher metric. The default fits them, starting from ``_weights``."""
        stages = self._stages(block, rank)

        def decompose(kernel: Tensor) -> Sequence[Tensor]:
            return self._weights(block, kernel, rank, generator)

        return decompose_in_metric(block, stages, weight, metric, decompose, iterations=iterations)

    def _loss_increases(self, block: ConvSpec, weight: Tensor, metric: KroneckerFisher) -> Mapping[Rank, float] | None:
        """Return the loss increase in nats at every rank, or None if there is no closed form."""
        return None

    def _unfoldings(self, block: ConvSpec, weight: Tensor) -> Sequence[Tensor]:
        """Return, for each entry of the rank, the matrix whose rank it bounds. Empty if there are no such matrices."""
        return ()

    def _spectra(self, block: ConvSpec, weight: Tensor) -> Sequence[Tensor]:
        """Return, for each entry of the rank, descending values whose sum after the rank bounds the squared error.

        The bounds of the entries add up. Empty if there is no bound.
        """
        return [squared_singular_values(matrix) for matrix in self._unfoldings(block, weight)]

    def _fast_variant(self, block: ConvSpec, rank: Rank) -> Factorization:
        """Return a cheaper factorization with about the same loss increase, for estimates."""
        return self

    @final
    def decompose(
        self,
        layer: ConvLayer,
        rank: Rank,
        *,
        metric: KroneckerFisher | None = None,
        generator: torch.Generator | None = None,
    ) -> ConvChain:
        """Return the chain of a given rank that approximates a convolution.

        For the matrix SVDs, and the spatial SVD without a metric, it is the best one (Eckart and Young 1936). For the
        others it is a local optimum. Half precision is decomposed in single precision.

        Args:
            layer: the convolution with its weight (out, in / groups, *kernel).
            rank: the rank of each group.
            metric: the Fisher metric in which the chain is close to the layer. If None, and for groups whose metric is
                zero, the Frobenius norm.
            generator: draws the start of a factorization that starts at random.

        Returns:
            The chain. Its weights have the dtype and the device of the layer's weight.

        Raises:
            RefusedError: if ``rejects`` returns a reason.
            RankError: if the convolution cannot have this rank.
            WeightError: if the weight has no finite values, or the weights of the chain overflow its dtype.
            SpecError: if the metric belongs to another convolution.
        """
        return self._chain(layer, rank, metric, generator, _FIT_ITERATIONS)

    @final
    def _chain(
        self,
        layer: ConvLayer,
        rank: Rank,
        metric: KroneckerFisher | None,
        generator: torch.Generator | None,
        iterations: int,
    ) -> ConvChain:
        specs = self.layout(layer.spec, rank)
        check_weight(layer.weight)
        if metric is not None:
            metric.check(layer.spec)
        weight = layer.weight.detach()
        weight = weight if weight.dtype == torch.float64 else weight.float()
        scale, block = weight_scale(weight), one_group(layer.spec)
        weight = weight if scale == 1.0 else weight / scale
        with no_reduced_precision(weight.device):
            by_group = [
                self._weights(block, part, rank, generator)
                if own is None
                else self._weights_in_metric(block, part, rank, metric=own, generator=generator, iterations=iterations)
                for part, own in _by_group(layer.spec.groups, block, weight, metric)
            ]
            if layer.weight.dtype in _HALF:  # otherwise stages keep similar norms, with which they train best
                by_group = [balance_stages(self._stages(block, rank), parts) for parts in by_group]
        joined = [torch.cat([part.flatten() for part in parts]) for parts in zip(*by_group, strict=True)]
        joined = joined if scale == 1.0 else [part * scale ** (1 / len(specs)) for part in joined]
        weights = [
            _cast(part, layer.weight.dtype).reshape(spec.out_channels, -1, *spec.kernel_size)
            for part, spec in zip(joined, specs, strict=True)
        ]
        biases = [None] * (len(specs) - 1) + [layer.bias]
        return ConvChain(tuple(ConvLayer(*stage) for stage in zip(specs, weights, biases, strict=True)))

    @final
    def loss_increases(self, layer: ConvLayer, metric: KroneckerFisher, ranks: Sequence[Rank]) -> list[float]:
        """Return the loss increase that each of the ranks causes, ½ tr(G Δ C Δᵀ) for the error Δ of the kernel.

        Without a closed form each value comes from a short fit, and is some per cent above that of ``decompose``.

        Args:
            layer: the convolution with its weight.
            metric: its Fisher metric, with the moments G of the output and C of the input.
            ranks: the ranks of each group.

        Returns:
            The increase for each of the ranks, in nats for one sample.

        Raises:
            RefusedError, RankError, WeightError, SpecError: as ``decompose``.
        """
        block, scale = one_group(layer.spec), weight_scale(layer.weight)
        if scale != 1.0:
            scaled = replace(layer, weight=layer.weight / scale)
            return [nats * scale * scale for nats in self.loss_increases(scaled, metric, ranks)]
        with no_reduced_precision(layer.weight.device):
            by_group = [
                None if own is None else self._loss_increases(block, part, own)
                for part, own in _by_group(layer.spec.groups, block, layer.weight.float(), metric)
            ]
        if all(known is not None for known in by_group):
            return [sum(known[rank] for known in by_group if known is not None) for rank in ranks]
        variants = ((self._fast_variant(block, rank), rank) for rank in ranks)
        chains = (variant._chain(layer, rank, metric, None, _ESTIMATE_ITERATIONS) for variant, rank in variants)
        return [metric.loss_increase(layer.spec, compose(chain).float() - layer.weight.float()) for chain in chains]

    @final
    def error_estimates(self, layer: ConvLayer, ranks: Sequence[Rank]) -> list[float] | None:
        """Return ‖W − Ŵ‖² / ‖W‖² at each of the ranks, or an estimate of it, from singular values.

        The values are exact for the SVDs (Eckart and Young 1936). Tucker and TT truncate one mode after the other. Mode
        m alone loses the share e_m of a kernel's energy, and all modes together lose between the largest e_m and Σ e_m
        (De Lathauwer, De Moor and Vandewalle 2000; Oseledets 2011). The estimate 1 - Π (1 - e_m) assumes that every
        mode loses its share of what the others keep.

        Args:
            layer: the convolution with its weight.
            ranks: the ranks of each group.

        Returns:
            A value between 0 and 1 for each of the ranks, or None if the factorization has no formula.
        """
        total, lost, block = 0.0, [0.0] * len(ranks), one_group(layer.spec)
        weight = layer.weight.detach() / weight_scale(layer.weight)
        for part in weight.float().chunk(layer.spec.groups):
            with no_reduced_precision(part.device):
                spectra = self._spectra(block, part)
            if not spectra:
                return None
            energy = float(part.square().sum())
            if not energy:
                continue
            sums = [spectrum.double().flip(0).cumsum(0).flip(0) for spectrum in spectra]
            tails = [(tail / energy).clamp_max(1).tolist() for tail in sums]
            for k, rank in enumerate(ranks):
                kept = math.prod(1 - tail[r] for tail, r in zip(tails, rank, strict=True) if r < len(tail))
                lost[k] += energy * (1 - kept)
            total += energy
        return [min(1.0, value / total) if total else 0.0 for value in lost]

    @final
    def unfoldings(self, layer: ConvLayer) -> list[tuple[Tensor, ...]]:
        """Return the kernel as the matrices whose ranks the rank bounds.

        Args:
            layer: the convolution with its weight.

        Returns:
            For each group one matrix for each entry of the rank, or no matrix if the rank bounds none (CP).
        """
        block, groups = one_group(layer.spec), layer.spec.groups
        return [tuple(self._unfoldings(block, part)) for part in layer.weight.detach().chunk(groups)]


def _by_group(
    groups: int, block: ConvSpec, weight: Tensor, metric: KroneckerFisher | None
) -> Iterator[tuple[Tensor, KroneckerFisher | None]]:
    """Yield the weight and the metric of each group: None without a metric, or if it makes the weight's norm zero."""
    for group, part in enumerate(weight.chunk(groups)):
        own = None if metric is None else metric.of_group(group).like(weight)
        yield part, None if own is None or not float(own.quadratic_form(block, part)) > 0 else own


def _cast(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a factor in a dtype. Raises WeightError if it overflows in half precision."""
    cast = factor.to(dtype)
    if dtype == torch.float16 and not bool(cast.isfinite().all()):
        largest = float(factor.abs().max())
        raise WeightError(f"a factor reaches {largest:.1e}, more than {dtype} holds. Convert the model to float32.")
    return cast


def check_weight(weight: Tensor) -> None:
    """Raise WeightError unless the weight has finite floating-point values.

    Args:
        weight: the weight of a convolution.

    Raises:
        WeightError: if it is of another dtype, on the meta device, or has NaN or Inf.
    """
    if not weight.dtype.is_floating_point:
        raise WeightError(f"the weight must be floating-point, got {weight.dtype}. Convert the model to a float type.")
    if weight.is_meta:
        raise WeightError(
            "the weight is on the meta device and has no values. Load its values first. Only plans with fixed ranks, "
            "and fxfact.apply(plan, model, weights='empty'), need none."
        )
    if not bool(torch.isfinite(weight).all()):
        count = int((~torch.isfinite(weight)).sum())
        raise WeightError(f"the weight holds {count} NaN or Inf of {weight.numel()} values. Fix or exclude it.")


def weight_scale(weight: Tensor) -> float:
    """Return a divisor with which the squares of a weight's values stay within single precision.

    Args:
        weight: the weight of a convolution.

    Returns:
        The largest absolute value if it is below 1e-10 or above 1e10, else 1.
    """
    largest = float(weight.detach().abs().max())
    return largest if largest and not 1e-10 < largest < 1e10 else 1.0


def check_generator(generator: object) -> None:
    """Raise ArgumentTypeError unless the argument is a ``torch.Generator`` or None.

    Args:
        generator: the argument of a caller.

    Raises:
        ArgumentTypeError: if it is something else.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentTypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
