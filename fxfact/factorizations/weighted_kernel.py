"""A kernel in its Fisher metric: how much of it a chain can keep, for all ranks at once and without a fit.

Let W be the kernel as a matrix, R the second moment of its rows and Q that of its columns, and T = R^½ W. The last
stage of a chain is linear in what the stages before it compute. If those compute the kernels B (q, columns), the best
last stage M leaves min_M ½ tr((M B − T) Q (M B − T)ᵀ) nats. With the Cholesky factor L of B Q Bᵀ and Y = L⁻¹ B Q Tᵀ,
that is ½ (tr(T Q Tᵀ) − ‖Y‖²). Row j of Y only depends on the kernels up to B_j. So the first k rows of Y belong to the
first k kernels, and one Cholesky factor serves every k. If a pointwise stage of rank r ends the chain, the last two
stages together are a matrix of rank r, and keep the r largest eigenvalues of Yᵀ Y (reduced-rank regression: Izenman
1975).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fxfact.conv import ConvLayer, ConvSpec, KroneckerFisher, LowRankMoment, Sizes, as_matrix, sqrt_and_inverse
from fxfact.factorizations.linalg import weight_scale
from fxfact.factorizations.stages import one_group


class Roots(NamedTuple):
    """The symmetric square root of a moment, and the inverse of that root."""

    root: Tensor
    inverse: Tensor


class Whitened(NamedTuple):
    """A kernel in coordinates in which its Fisher metric is nearly the identity.

    Attributes:
        tensor: the kernel (inner, positions of each group of axes …, outer).
        roots: for each axis but the last, the root that it was multiplied by.
    """

    tensor: Tensor
    roots: list[Roots]

    @property
    def inverses(self) -> list[Tensor]:
        """What leads back to the kernel's own coordinates: a symmetric matrix for each axis but the last."""
        return [own.inverse for own in self.roots]


class WeightedKernel:
    """The kernel of one group of a convolution in a Fisher metric, which several factorizations share.

    The rows of the kernel as a matrix belong to the "outer" channels and its columns to the "inner" channels: the
    outputs and the inputs, or for a transposed convolution the inputs and the outputs. A transposed convolution is
    treated as the mirrored chain, whose last stage acts on the outer channels as well. A pointwise convolution or a
    linear layer with more outputs than inputs is taken for a transposed one, which is the same and has fewer outer
    channels.

    Args:
        block: the convolution of one group.
        weight: its kernel (out, in, *kernel).
        metric: its Fisher metric.
        keep_sides: whether the outer channels are the outputs in any case.

    Attributes:
        outer: the number of outer channels.
        inner: the number of inner channels.
        kernel_size: the kernel size along each axis.
        positions: the number of kernel positions.
        columns: the moment Q of the columns.
        outer_roots: the square root of the moment R of the rows, and its inverse.
        target: T = R^½ W (outer, inner · positions).
    """

    def __init__(self, block: ConvSpec, weight: Tensor, metric: KroneckerFisher, *, keep_sides: bool = False) -> None:
        if not keep_sides and block.is_pointwise and len(as_matrix(block, weight)) > as_matrix(block, weight).shape[1]:
            block = replace(block, transposed=not block.transposed, padding_mode="zeros")
        rows, self.columns = metric.row_and_column_moments(block)
        matrix = as_matrix(block, weight)
        self.block, self.weight, self.metric = block, weight, metric
        self.outer, self.inner = len(matrix), block.out_channels if block.transposed else block.in_channels
        self.kernel_size, self.positions = block.kernel_size, math.prod(block.kernel_size)
        is_matrix = not isinstance(self.columns, LowRankMoment) and len(self.columns.factors) == 1
        self._matrix = self.columns.factors[0][0] if is_matrix else None
        self.outer_roots = Roots(*rows.root_and_inverse())
        self.target = self.outer_roots.root @ matrix

    @cached_property
    def weighted_target(self) -> Tensor:
        """T Q (outer, inner · positions)."""
        return self.weigh(self.target)

    @cached_property
    def total(self) -> float:
        """tr(T Q Tᵀ), twice what losing the kernel costs in nats."""
        return float((self.weighted_target * self.target).double().sum())

    @property
    def vanishes(self) -> bool:
        """Whether the kernel's norm in the metric is zero, so that every chain is as good as any other."""
        return not float(self.metric.quadratic_form(self.block, self.weight)) > 0

    def _gram(self) -> Tensor:
        """Return T Q Tᵀ (outer, outer) in double precision."""
        # The kernels of linear layers may be very large, and nothing else asks for their T Q.
        gram = self.columns.gram(self.target) if self.positions == 1 else self.weighted_target @ self.target.T
        return gram.double()

    @cached_property
    def spectrum(self) -> Tensor:
        """The eigenvalues (outer,) of T Q Tᵀ, descending, in double precision."""
        values: Tensor = torch.linalg.eigvalsh(self._gram())
        return values.clamp_min(0).flip(0)

    @cached_property
    def directions(self) -> Tensor:
        """The eigenvectors (outer, outer) of T Q Tᵀ, as columns in the order of ``spectrum``, in double precision."""
        vectors: Tensor = torch.linalg.eigh(self._gram())[1]
        return vectors.flip(1)

    def weigh(self, rows: Tensor) -> Tensor:
        """Multiply by the moment of the columns.

        Args:
            rows: a matrix (count, inner · positions).

        Returns:
            ``rows`` · Q.
        """
        # Without a detour in the common case of one factor, because fits do nothing more often.
        return self.columns.left_multiply(rows) if self._matrix is None else rows @ self._matrix

    def missed_by(self, composed: Tensor) -> Tensor:
        """Compute the loss increase of a chain.

        Args:
            composed: the kernel that it composes to, as a matrix (outer, inner · positions).

        Returns:
            The increase in nats for one sample, a scalar.
        """
        difference = self.outer_roots.root @ composed - self.target
        return (self.weigh(difference) * difference).sum() / 2

    @cached_property
    def inner_roots(self) -> Roots:
        """The square root of the moment of the inner channels (inner, inner), and its inverse."""
        return Roots(*sqrt_and_inverse(self.columns.channel_moment(self.inner)))

    @property
    def channel_roots(self) -> tuple[Roots, Roots]:
        """The roots for the input channels, then those for the output channels."""
        roots = (self.inner_roots, self.outer_roots)
        return roots[::-1] if self.block.transposed else roots

    def is_separable(self, *axes: Sizes) -> bool:
        """Say whether ``whitened`` makes the metric the identity.

        Args:
            axes: the groups of axes.

        Returns:
            Whether Q is the Kronecker product of the moments that the kernel is multiplied by.
        """
        return len(self.columns.factors) > 1 and len(axes) == 1

    def whitened(self, *axes: Sizes) -> Whitened:
        """Multiply the kernel by the square roots of the moments of its channels and of its positions.

        The positions of each group of axes have a moment of their own: the trace of Q over everything else. If Q is
        their Kronecker product with that of the channels, squared distances between whitened kernels are twice the loss
        increases.

        Args:
            axes: the groups of axes. Together they have every axis once.

        Returns:
            The kernel, and the roots that lead there and back.
        """
        order = [axis for own in axes for axis in own]
        kernel = self.target.reshape(self.outer, self.inner, *self.kernel_size)
        kernel = kernel.permute(1, *(axis + 2 for axis in order), 0)
        tensor = kernel.reshape(self.inner, *(math.prod(self.kernel_size[k] for k in own) for own in axes), self.outer)
        roots = [self.inner_roots, *(Roots(*sqrt_and_inverse(self._position_moment(own))) for own in axes)]
        for mode, own in enumerate(roots):
            tensor = torch.tensordot(tensor, own.root, dims=([mode], [0])).movedim(-1, mode)
        return Whitened(tensor.contiguous(), roots)

    def _position_moment(self, axes: Sizes) -> Tensor:
        """Return the moment of the positions along some axes, with a mean of 1 on the diagonal."""
        moment, sizes = self.columns.position_moment(self.positions), self.kernel_size
        names = "abcdefgh"[: len(sizes)]
        rows, columns = names, "".join(n.upper() if k in axes else n for k, n in enumerate(names))
        kept = "".join(names[k] for k in axes)
        part = torch.einsum(f"{rows}{columns}->{kept}{kept.upper()}", moment.reshape(*sizes, *sizes))
        size = math.prod(sizes[k] for k in axes)
        part = part.reshape(size, size)
        return part * (size / part.trace().clamp_min(torch.finfo(part.dtype).tiny))

    def explained(self, kernels: Tensor, gram: Tensor | None = None) -> Tensor:
        """Compute what a last stage can keep of the kernel.

        Args:
            kernels: the kernels B (q, inner · positions) that the last stage sees.
            gram: B Q Bᵀ, if there is a short way to it.

        Returns:
            Y (q, outer) in double precision: the first k kernels keep the squares of the first k rows.
        """
        if gram is None:
            gram = self.weigh(kernels) @ kernels.T
        triangle = cholesky(gram)
        right: Tensor = (kernels @ self.weighted_target.T).double()
        solved: Tensor = torch.linalg.solve_triangular(triangle, right, upper=False)
        return solved

    def explained_along(self, stage: Tensor, axes: Sizes) -> Tensor:
        """Compute ``explained`` for a last stage along all axes but those of the stages before it.

        Args:
            stage: the composed kernel of the stages before (q, inner, positions of ``axes``).
            axes: their axes.

        Returns:
            Y, whose rows are ordered by q, then by the position in the last stage.
        """
        if not axes and len(self.columns.factors) > 1:
            return self._explained_separably(stage[..., 0])
        count, _, before = stage.shape
        after = self.positions // before
        others = tuple(axis for axis in range(len(self.kernel_size)) if axis not in axes)
        sizes = [self.kernel_size[axis] for axis in (*axes, *others)]
        kernels = torch.einsum("qia,bc->qbiac", stage, torch.eye(after, dtype=stage.dtype, device=stage.device))
        kernels = kernels.reshape(count * after, self.inner, *sizes).permute(0, 1, *_inverse_order(axes, others))
        return self.explained(kernels.flatten(1), self._gram_along(stage, (*axes, *others)))

    def _explained_separably(self, rows: Tensor) -> Tensor:
        """Return ``explained_along`` for a pointwise stage (q, inner), without a matrix of all rows and positions.

        The Gram matrix is a Kronecker product, and so is its Cholesky factor.
        """
        channels, places = (factor[0] for factor in self.columns.factors)
        target = self.weighted_target.reshape(self.outer, self.inner, self.positions)
        right = torch.einsum("qi,oip->qpo", rows, target).double()
        triangle = cholesky(rows @ channels @ rows.T)
        solved = torch.linalg.solve_triangular(triangle, right.flatten(1), upper=False).reshape(right.shape)
        explained: Tensor = torch.linalg.solve_triangular(cholesky(places), solved, upper=False)
        return explained.flatten(0, 1)

    def _gram_along(self, stage: Tensor, order: Sizes) -> Tensor | None:
        """Return the Gram matrix of the kernels of ``explained_along`` without a product with the whole moment."""
        if len(self.columns.factors) == 1:
            return None
        channels, places = (factor[0] for factor in self.columns.factors)
        count, _, before = stage.shape
        after, axes = self.positions // before, len(order)
        places = places.reshape(*self.kernel_size, *self.kernel_size).permute(*order, *(axes + axis for axis in order))
        pairs = torch.einsum("qia,ij,rjc->qarc", stage, channels, stage)
        gram = torch.einsum("qarc,abcd->qbrd", pairs, places.reshape(before, after, before, after))
        return gram.reshape(count * after, count * after)

    def explained_by_components(self, inner: Tensor, places: Tensor) -> Tensor:
        """Compute ``explained`` for kernels of rank one.

        Args:
            inner: their inner channels (q, inner).
            places: their positions (q, positions).

        Returns:
            Y (q, outer).
        """
        kernels = (inner[:, :, None] * places[:, None, :]).flatten(1)
        if len(self.columns.factors) == 1:
            return self.explained(kernels)
        by_channel, by_place = (factor[0] for factor in self.columns.factors)
        return self.explained(kernels, (inner @ by_channel @ inner.T) * (places @ by_place @ places.T))

    def missed(self, explained: float) -> float:
        """Compute the loss increase of a chain from what it keeps.

        Args:
            explained: its share of tr(T Q Tᵀ), a sum of squares of ``explained``.

        Returns:
            The increase in nats for one sample.
        """
        return max(0.0, self.total - explained) / 2


class WeightedLayer:
    """A convolution in its Fisher metric. What its factorizations share is computed once.

    Args:
        layer: the convolution with its weight.
        metric: its Fisher metric, with the moments G of the output and C of the input.

    Attributes:
        scale: what the weight was divided by, so that its squares stay within single precision.
        layer: the convolution with the divided weight in single precision.

    Raises:
        SpecError: if the metric belongs to another convolution.
    """

    def __init__(self, layer: ConvLayer, metric: KroneckerFisher) -> None:
        metric.check(layer.spec)
        self.scale, self.metric = weight_scale(layer.weight), metric
        weight = layer.weight.detach().float()
        self.layer = replace(layer, weight=weight if self.scale == 1 else weight / self.scale)  # it may be very large

    @cached_property
    def kernels(self) -> tuple[WeightedKernel, ...]:
        """The kernel of each group, divided by ``scale``, in single precision."""
        block, parts = one_group(self.layer.spec), self.layer.weight.chunk(self.layer.spec.groups)
        return tuple(WeightedKernel(block, part, self.metric.of_group(k).like(part)) for k, part in enumerate(parts))

    def loss_increase(self, kernel: Tensor) -> float:
        """Compute the loss increase of another kernel.

        Args:
            kernel: the kernel (out, in / groups, *kernel) that takes the place of the layer's.

        Returns:
            The increase in nats for one sample.
        """
        return self.metric.loss_increase(self.layer.spec, kernel.float() - self.layer.weight)


def _inverse_order(axes: Sizes, others: Sizes) -> list[int]:
    """Return where in (samples, channels, *axes, *others) each axis is, in their natural order."""
    order = (*axes, *others)
    return [2 + order.index(axis) for axis in range(len(order))]


def principal_directions(matrix: Tensor) -> Tensor:
    """Return the left singular vectors (rows, rows) of a matrix (rows, columns), descending, from its Gram matrix."""
    wide = matrix.double()
    _, vectors = torch.linalg.eigh(wide @ wide.T)
    directions: Tensor = vectors.flip(1).to(matrix)
    return directions


def largest_eigenvalues(rows: Tensor, count: int) -> float:
    """Return the sum of the ``count`` largest eigenvalues of ``rows``ᵀ · ``rows``."""
    square = rows.T @ rows if len(rows) >= rows.shape[1] else rows @ rows.T
    return float(torch.linalg.eigvalsh(square)[-count:].sum())


def cholesky(gram: Tensor) -> Tensor:
    """Return the Cholesky factor of a Gram matrix in double precision, damped as little as it needs."""
    wide = gram.double()
    mean = float(wide.diagonal().mean())
    ridge = max(torch.finfo(gram.dtype).eps * mean, torch.finfo(wide.dtype).tiny)
    while True:
        triangle: Tensor
        triangle, failed = torch.linalg.cholesky_ex(wide + torch.diag(wide.new_full((len(wide),), ridge)))
        if not failed or not math.isfinite(ridge):
            return triangle
        ridge *= 100
