"""The Kronecker-factored Fisher information of a convolution: by how much an error of its kernel raises the loss.

Let W be the kernel as a matrix (out, in · kernel), C = E[p pᵀ] the second moment of the input patches p, and
G = E[Σ_positions g gᵀ] that of the gradients g at the output, for labels drawn from the model's output distribution.
Then an error Δ of W raises the loss by about ½ tr(G Δ C Δᵀ) (K-FAC: Martens and Grosse 2015; Grosse and Martens 2016).

A transposed convolution scatters patches to its output. There W is (in, out · kernel), C = E[x xᵀ] has the size of the
input channels, and G that of the output patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxfact.conv.spec import ConvSpec
from fxfact.errors import SpecError
from fxfact.utils import no_reduced_precision

MIN_EIGENVALUE = 1e-7  # as a fraction of the largest one
_STRIP = 512  # rows of a matrix that are multiplied at a time


@dataclass(frozen=True, eq=False)
class KroneckerMoment:
    """One second moment per group, as a Kronecker product of symmetric positive semidefinite matrices.

    Attributes:
        factors: The matrices, each ``(groups, n_i, n_i)``. A single factor is the moment itself. Two factors belong to
            the channels and to the kernel positions.
    """

    factors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """The number of rows of one group's moment."""
        return math.prod(factor.shape[-1] for factor in self.factors)

    @property
    def groups(self) -> int:
        """The number of groups."""
        return self.factors[0].shape[0]

    @property
    def diagonals(self) -> tuple[Tensor, ...]:
        """The diagonal of each factor ``(groups, n_i)``."""
        return tuple(factor.diagonal(dim1=1, dim2=2) for factor in self.factors)

    def of_group(self, group: int) -> KroneckerMoment:
        """Return the moment of one group."""
        return KroneckerMoment(tuple(factor[group : group + 1] for factor in self.factors))

    def like(self, tensor: Tensor) -> KroneckerMoment:
        """Return the moment in the dtype and on the device of ``tensor``."""
        return KroneckerMoment(tuple(factor.to(tensor) for factor in self.factors))

    def left_multiply(self, rows: Tensor) -> Tensor:
        """Return ``rows`` (m, n) @ M, where M (n, n) is the moment of the first group."""
        sizes = [factor.shape[-1] for factor in self.factors]
        product = rows.reshape(-1, *sizes)
        for axis, factor in enumerate(self.factors, start=1):
            product = torch.tensordot(product, factor[0], dims=([axis], [0])).movedim(-1, axis)
        return product.reshape(rows.shape)

    def channel_moment(self, count: int) -> Tensor:
        """Return the first group's moment of its ``count`` channels (count, count), summed over kernel positions."""
        if len(self.factors) > 1:
            return self.factors[0][0] * self.factors[1][0].trace()
        positions = self.size // count
        return torch.einsum("iaja->ij", self.factors[0][0].reshape(count, positions, count, positions))

    def root_and_inverse(self) -> tuple[Tensor, Tensor]:
        """Return the symmetric square root of the first group's only factor, and its inverse: ``sqrt_and_inverse``."""
        return sqrt_and_inverse(self.factors[0][0])

    def position_moment(self, count: int) -> Tensor:
        """Return the first group's moment of its ``count`` kernel positions (count, count), summed over channels."""
        if len(self.factors) > 1:
            return self.factors[1][0]
        channels = self.size // count
        return torch.einsum("iaib->ab", self.factors[0][0].reshape(channels, count, channels, count))

    def gram(self, rows: Tensor) -> Tensor:
        """Return ``rows`` (m, n) @ M @ ``rows``ᵀ for the first group (m, m), from a strip of rows at a time."""
        return torch.cat([self.left_multiply(strip) @ rows.T for strip in torch.split(rows, _STRIP)])

    def shrunk(self, samples: int, least: float = 0.0) -> KroneckerMoment:
        """Return the moment with each factor shrunk towards the multiple of the identity with the same trace.

        A moment of few samples overfits them; a shrunk one is closer to the moment of new data. The share of the
        identity is the best one for that many Gaussian samples (oracle approximating shrinkage: Chen, Wiesel, Eldar
        and Hero 2010), but at least ``least``.
        """
        return self._with_identity(lambda factor: _shares(factor, samples).clamp_min(least), keep_trace=True)

    def damped(self, amount: float) -> KroneckerMoment:
        """Return the moment with ``amount`` times the mean of the diagonal added to the diagonal of each factor."""
        return self._with_identity(lambda factor: factor.new_full((len(factor),), amount), keep_trace=False)

    def _with_identity(self, shares: Callable[[Tensor], Tensor], *, keep_trace: bool) -> KroneckerMoment:
        """Add the identity, times the mean of the diagonal, to each factor. ``shares`` returns how much per group."""
        mixed = []
        for factor in self.factors:
            share = shares(factor)[:, None, None]
            mean = factor.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
            eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
            mixed.append((1 - share if keep_trace else 1) * factor + share * mean * eye)
        return KroneckerMoment(tuple(mixed))


def _shares(moments: Tensor, samples: int) -> Tensor:
    """Return the share of the identity (groups,) for ``moments`` (groups, n, n) of that many samples."""
    square = moments.double().square().sum(dim=(1, 2))
    trace = moments.double().diagonal(dim1=1, dim2=2).sum(dim=1)
    return shrinkage(square, trace, moments.shape[-1], samples).to(moments)


def shrinkage(square: Tensor, trace: Tensor, size: int, samples: int) -> Tensor:
    """Return the share of the identity by the oracle approximating shrinkage (Chen et al. 2010).

    Args:
        square: The squared Frobenius norm of each moment.
        trace: The trace of each moment.
        size: The number of rows of a moment.
        samples: The number of samples that the moments are means of.
    """
    numerator = (1 - 2 / size) * square + trace.square()
    denominator = (samples + 1 - 2 / size) * (square - trace.square() / size)
    return torch.where(denominator > numerator, numerator / denominator.clamp_min(1e-300), 1.0)


@dataclass(frozen=True, eq=False)
class KroneckerFisher:
    """The Fisher information of a convolution's kernel: the Kronecker product of two moments per group.

    Attributes:
        input: The moment C of the inputs. Its size is in · kernel, or in for a transposed convolution, where ``in``
            counts the channels of one group.
        output: The moment G of the gradients at the output, in nats for one sample (a nat is the unit of a loss that
            uses the natural logarithm). Its size is out, or out · kernel for a transposed convolution.
    """

    input: KroneckerMoment
    output: KroneckerMoment

    def check(self, spec: ConvSpec) -> None:
        """Raise SpecError unless the moments have the sizes that ``spec`` needs."""
        into, out = spec.in_channels // spec.groups, spec.out_channels // spec.groups
        positions = math.prod(spec.kernel_size)
        needed = (into, out * positions) if spec.transposed else (into * positions, out)
        found = (self.input.size, self.output.size)
        groups = {self.input.groups, self.output.groups}
        if found != needed or groups != {spec.groups}:
            raise SpecError(
                f"{spec} needs moments of sizes {needed} for {spec.groups} groups, got {found} for {sorted(groups)}. "
                "Collect them on this network."
            )

    def of_group(self, group: int) -> KroneckerFisher:
        """Return the Fisher information of one group."""
        return KroneckerFisher(self.input.of_group(group), self.output.of_group(group))

    def like(self, tensor: Tensor) -> KroneckerFisher:
        """Return both moments in the dtype and on the device of ``tensor``."""
        return KroneckerFisher(self.input.like(tensor), self.output.like(tensor))

    def damped(self, amount: float) -> KroneckerFisher:
        """Return both moments damped: see ``KroneckerMoment.damped``."""
        return KroneckerFisher(self.input.damped(amount), self.output.damped(amount))

    def row_and_column_moments(self, spec: ConvSpec) -> tuple[KroneckerMoment, KroneckerMoment]:
        """Return the moments of the rows and of the columns of ``as_matrix``."""
        return (self.input, self.output) if spec.transposed else (self.output, self.input)

    def quadratic_form(self, spec: ConvSpec, difference: Tensor) -> Tensor:
        """Return tr(G Δ C Δᵀ) for the first group, where Δ is the ``difference`` of two kernels (out, in, *kernel)."""
        rows, columns = self.row_and_column_moments(spec)
        matrix = as_matrix(spec, difference)
        if len(matrix) > matrix.shape[1]:
            rows, columns, matrix = columns, rows, matrix.T
        return rows.left_multiply(columns.gram(matrix)).trace()

    def loss_increase(self, spec: ConvSpec, difference: Tensor) -> float:
        """Return the estimated loss increase for one sample, in nats: ½ tr(G Δ C Δᵀ), summed over groups.

        Δ is the ``difference`` of two kernels (out, in / groups, *kernel).
        """
        parts = difference.chunk(spec.groups)
        with no_reduced_precision(difference.device):
            squares = [self.of_group(k).like(part).quadratic_form(spec, part) for k, part in enumerate(parts)]
        return max(0.0, float(torch.stack(squares).double().sum()) / 2)


def as_matrix(spec: ConvSpec, kernel: Tensor) -> Tensor:
    """Return a kernel (out, in, *kernel) as a matrix (out, in · kernel), or (in, out · kernel) if transposed."""
    return (kernel.transpose(0, 1) if spec.transposed else kernel).flatten(1)


def sqrt_and_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of a positive semidefinite matrix, and the inverse of that root.

    Eigenvalues below 1e-7 times the largest one are raised to that bound.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    values = values.clamp_min(float(values[-1].clamp_min(torch.finfo(torch.float64).tiny)) * MIN_EIGENVALUE).sqrt()
    root, inverse = ((vectors * scale) @ vectors.T for scale in (values, 1 / values))
    return root.to(matrix), inverse.to(matrix)
