"""The base class of all factorizations."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fxfact.conv import ConvChain, ConvLayer, ConvSpec, KroneckerFisher, compose
from fxfact.errors import ArgumentTypeError, RefusedError, WeightError
from fxfact.factorizations.balance import balance_stages, balance_together
from fxfact.factorizations.fit import fit_chain, start_in_metric
from fxfact.factorizations.linalg import squared_singular_values, weight_scale
from fxfact.factorizations.shared_stages import joint_kernel, joint_weights
from fxfact.factorizations.stages import ChainLayout, Rank, one_group
from fxfact.factorizations.weighted_kernel import WeightedKernel, WeightedLayer
from fxfact.utils import no_reduced_precision

_FIT_ITERATIONS = 200  # for weights that will be used
_HALF = (torch.float16, torch.bfloat16)
_QUICK_ITERATIONS = 24  # for weights that are compared, and for the loss increases that a plan is made from


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

    - ``_weights_in_metric`` if there is a closed form, ``_loss_increases`` if there is one for the error alone,
    - ``_unfoldings`` if each entry of the rank bounds the rank of a matrix, or ``_spectra`` if other values bound the
      error,
    - ``_shared_stages`` and ``_shared_weights`` if layers of equal shape can share all stages but one,
    - ``_feasible_rank`` if the entries of a rank bound each other,
    - ``_tensorly_rank`` if TensorLy has a rule for a fraction of the parameters.

    Attributes:
        name: the name in plans, reports and files.
        factorizes_linear: whether it factorizes linear layers, blocks without spatial axes. Otherwise it rejects them
            without a call of ``_rejects``.
        is_fitted: whether weights in a Fisher metric come from a fit, which can go on from where it ended.
        restricts: the name of a factorization that is at least as close at the same rank, if there is one. Planning
            with a budget only tries both where this one is clearly smaller.
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
        kernel: WeightedKernel,
        rank: Rank,
        *,
        start: Sequence[Tensor] | None,
        generator: torch.Generator | None,
        iterations: int,
    ) -> Sequence[Tensor]:
        """Return weights that are close in a Fisher metric. The default fits them.

        The fit begins at ``start``, which are weights of the stages, or if there are none at ``_weights``.
        """
        block = kernel.block
        stages = self._stages(block, rank)
        if start is None:
            start = start_in_metric(kernel, stages, lambda weight: self._weights(block, weight, rank, generator))
        return fit_chain(kernel, stages, start, iterations=iterations)

    def _shared_weights(self, kernels: Sequence[WeightedKernel], rank: Rank) -> Sequence[Tensor]:
        """Return the weights of the shared stages, in order, for the kernels of a joint set in double precision.

        Each tensor holds the elements of one stage's weight (out, in, *kernel) in order.
        """
        raise NotImplementedError(f"{type(self).__name__} has shared stages, but no _shared_weights")

    def _loss_increases(self, kernel: WeightedKernel, ranks: Sequence[Rank]) -> Sequence[float] | None:
        """Return the loss increase in nats at each of the ranks, or None if it takes a fit to know it."""
        return None

    def _unfoldings(self, block: ConvSpec, weight: Tensor) -> Sequence[Tensor]:
        """Return, for each entry of the rank, the matrix whose rank it bounds. Empty if there are no such matrices."""
        return ()

    def _spectra(self, block: ConvSpec, weight: Tensor) -> Sequence[Tensor]:
        """Return, for each entry of the rank, descending values whose sum after the rank bounds the squared error.

        The bounds of the entries add up. Empty if there is no bound.
        """
        return [squared_singular_values(matrix) for matrix in self._unfoldings(block, weight)]

    @final
    def decompose(
        self,
        layer: ConvLayer,
        rank: Rank,
        *,
        metric: KroneckerFisher | None = None,
        generator: torch.Generator | None = None,
        start: Sequence[Tensor] | None = None,
        quick: bool = False,
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
            start: the weights of the stages of a chain of this rank, at which the fit in the metric begins.
            quick: whether the fit in the metric ends after a few iterations, some per cent above the optimum.

        Returns:
            The chain. Its weights have the dtype and the device of the layer's weight.

        Raises:
            RefusedError: if ``rejects`` returns a reason.
            RankError: if the convolution cannot have this rank.
            WeightError: if the weight has no finite values, or the weights of the chain overflow its dtype.
            SpecError: if the metric belongs to another convolution.
        """
        specs = self.layout(layer.spec, rank)
        check_weight(layer.weight)
        if metric is not None:
            metric.check(layer.spec)
            if self.is_fitted and start is None and not quick:  # so that going on from a quick fit ends at the same
                chain = self.decompose(layer, rank, metric=metric, generator=generator, quick=True)
                start = [stage.weight for stage in chain.layers]
        weight = layer.weight.detach()
        weight = weight if weight.dtype == torch.float64 else weight.float()
        scale, block = weight_scale(weight), one_group(layer.spec)
        weight = weight if scale == 1.0 else weight / scale
        starts = (
            [None] * layer.spec.groups
            if start is None or scale != 1.0
            else _start_by_group(layer.spec.groups, specs, start, weight)
        )
        iterations = _QUICK_ITERATIONS if quick else _FIT_ITERATIONS
        with no_reduced_precision(weight.device):
            by_group = [
                self._weights(block, part, rank, generator)
                if kernel is None
                else self._weights_in_metric(kernel, rank, start=own, generator=generator, iterations=iterations)
                for own, (part, kernel) in zip(starts, _by_group(layer.spec.groups, block, weight, metric), strict=True)
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
    def decompose_jointly(
        self, layers: Sequence[ConvLayer], rank: Rank, metrics: Sequence[KroneckerFisher | None]
    ) -> list[ConvChain]:
        """Return chains of a given rank that approximate several convolutions, with equal weights in ``shared_stages``.

        The shared stages are found for all layers together, in the mean of their metrics. The other stage of each chain
        is the best one for its own layer, in the layer's own metric.

        Args:
            layers: convolutions with weights of one shape (out, in, *kernel), dtype and device.
            rank: the rank.
            metrics: for each layer the Fisher metric in which its chain is close. None, and a metric that is zero,
                mean the Frobenius norm relative to the layer's.

        Returns:
            The chain of each layer. At full rank it is exact if the shared stages can hold all channels: those of
            Tucker always, the first stage of a matrix SVD if the layers do not have more inputs than outputs.

        Raises:
            RefusedError: if such layers share no stages, or ``rejects`` returns a reason.
            RankError: if the convolutions cannot have this rank.
            WeightError: if a weight has no finite values, or the weights of a chain overflow its dtype.
            SpecError: if a metric belongs to another convolution.
        """
        chains = [self.layout(layer.spec, rank) for layer in layers]
        shared = self.shared_stages(layers[0].spec, rank)
        if not shared:
            raise RefusedError(f"{self.name} of rank {rank} has no stages that layers can share ({layers[0].spec})")
        for layer, metric in zip(layers, metrics, strict=True):
            check_weight(layer.weight)
            if metric is not None:
                metric.check(layer.spec)
        with no_reduced_precision(layers[0].weight.device):
            kernels = [joint_kernel(layer, metric) for layer, metric in zip(layers, metrics, strict=True)]
            stages = self._stages(kernels[0].block, rank)
            weights = joint_weights(kernels, stages, shared, self._shared_weights(kernels, rank))
            if layers[0].weight.dtype in _HALF:
                weights = balance_together(stages, weights)
        return [
            ConvChain(
                tuple(
                    ConvLayer(spec, _cast(part, layer.weight.dtype), layer.bias if spec is specs[-1] else None)
                    for spec, part in zip(specs, parts, strict=True)
                )
            )
            for layer, specs, parts in zip(layers, chains, weights, strict=True)
        ]

    @final
    def loss_increases(self, weighted: WeightedLayer, ranks: Sequence[Rank]) -> list[float]:
        """Return the loss increase that each of the ranks causes, ½ tr(G Δ C Δᵀ) for the error Δ of the kernel.

        The values are exact for the matrix SVDs. The others are some per cent above those of ``decompose``: they are
        computed without a fit, or by a short one if the factorization has no formula.

        Args:
            weighted: the convolution in its metric. It may serve several factorizations.
            ranks: the ranks of each group.

        Returns:
            The increase for each of the ranks, in nats for one sample.

        Raises:
            RefusedError, RankError, WeightError: as ``decompose``.
        """
        layer = weighted.layer
        check_weight(layer.weight)
        self.layouts(layer.spec, ranks)  # refuses ranks that the convolution cannot have
        with no_reduced_precision(layer.weight.device):
            increases = self._formula(weighted, ranks)
        if increases is None:
            chains = (self.decompose(layer, rank, metric=weighted.metric, quick=True) for rank in ranks)
            increases = [weighted.loss_increase(compose(chain)) for chain in chains]
        return [nats * weighted.scale**2 for nats in increases]

    def _formula(self, weighted: WeightedLayer, ranks: Sequence[Rank]) -> list[float] | None:
        """Return ``_loss_increases``, summed over the groups."""
        totals = [0.0] * len(ranks)
        for kernel in weighted.kernels:
            found = None if kernel.vanishes else self._loss_increases(kernel, ranks)
            if found is None:
                return None
            totals = [total + nats for total, nats in zip(totals, found, strict=True)]
        return totals

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
) -> Iterator[tuple[Tensor, WeightedKernel | None]]:
    """Yield the weight of each group, alone and in its metric: None without one, or if it makes the norm zero."""
    for group, part in enumerate(weight.chunk(groups)):
        kernel = None if metric is None else WeightedKernel(block, part, metric.of_group(group).like(weight))
        yield part, None if kernel is None or kernel.vanishes else kernel


def _start_by_group(
    groups: int, specs: Sequence[ConvSpec], start: Sequence[Tensor], like: Tensor
) -> list[list[Tensor]]:
    """Return the weights of the stages for each group, from those of all groups."""
    shaped = [part.detach().to(like).reshape(spec.weight_shape) for part, spec in zip(start, specs, strict=True)]
    return [list(parts) for parts in zip(*(part.chunk(groups) for part in shaped), strict=True)]


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


def check_generator(generator: object) -> None:
    """Raise ArgumentTypeError unless the argument is a ``torch.Generator`` or None.

    Args:
        generator: the argument of a caller.

    Raises:
        ArgumentTypeError: if it is something else.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentTypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
