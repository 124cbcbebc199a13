"""The Kronecker-factored Fisher metric of a convolution: which errors of its kernel the loss can bear.

With W the kernel as a matrix (out, in · kernel), C = E[p pᵀ] over input patches and G = E[Σ_positions g gᵀ] over the
gradients at the output, for labels drawn from the model's own output, an error Δ raises the loss by about
½ tr(G Δ C Δᵀ) (Martens and Grosse 2015; Grosse and Martens 2016). A transposed convolution scatters patches of its
output instead: W is (in, out · kernel), C = E[x xᵀ] has the size of its input channels, G that of its output patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxfact.conv.spec import ConvSpec
from fxfact.errors import SpecError

_LEAST = 1e-7  # of the largest eigenvalue


@dataclass(frozen=True, eq=False)
class KroneckerMoment:
    """A second moment for every group: the Kronecker product of ``factors``, each (groups, n_i, n_i), symmetric and
    positive semidefinite. One factor is the moment itself; two are (channels, kernel positions).
    """

    factors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Rows, and columns, of one group's matrix."""
        return math.prod(factor.shape[-1] for factor in self.factors)

    def of_group(self, group: int) -> KroneckerMoment:
        """The moment of one group, as the only one."""
        return KroneckerMoment(tuple(factor[group : group + 1] for factor in self.factors))

    def like(self, tensor: Tensor) -> KroneckerMoment:
        """The moment in the dtype and on the device of ``tensor``."""
        return KroneckerMoment(tuple(factor.to(tensor) for factor in self.factors))

    def after(self, rows: Tensor) -> Tensor:
        """``rows`` (m, n) times the matrix of the first group."""
        sizes = [factor.shape[-1] for factor in self.factors]
        product = rows.reshape(-1, *sizes)
        for axis, factor in enumerate(self.factors, start=1):
            product = torch.tensordot(product, factor[0], dims=([axis], [0])).movedim(-1, axis)
        return product.reshape(rows.shape)

    def channels(self, count: int) -> Tensor:
        """The first group's moment of channels alone (count, count): summed over positions of the kernel."""
        if len(self.factors) > 1:
            return self.factors[0][0] * self.factors[1][0].trace()
        positions = self.size // count
        return torch.einsum("iaja->ij", self.factors[0][0].reshape(count, positions, count, positions))

    def shrunk(self, samples: int, least: float = 0.0) -> KroneckerMoment:
        """The factors moved towards the multiple of the identity that has the same trace, as estimates of covariances
        are that are to hold for other data: by the share that suits so many Gaussian samples (the oracle approximating
        shrinkage of Chen, Wiesel, Eldar and Hero 2010), and by ``least``.
        """
        return self._with_identity(lambda factor: _shrinkage(factor, samples).clamp_min(least), keeping_trace=True)

    def damped(self, amount: float) -> KroneckerMoment:
        """With ``amount`` times the mean of the diagonal added to the diagonal, for moments that lack rank."""
        return self._with_identity(lambda factor: factor.new_full((len(factor),), amount), keeping_trace=False)

    def _with_identity(self, amounts: Callable[[Tensor], Tensor], *, keeping_trace: bool) -> KroneckerMoment:
        """The share of the identity's multiple, for every group, is what ``amounts`` says of a factor."""
        found = []
        for factor in self.factors:
            share = amounts(factor)[:, None, None]
            mean = factor.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
            eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
            found.append((1 - share if keeping_trace else 1) * factor + share * mean * eye)
        return KroneckerMoment(tuple(found))


def _shrinkage(moments: Tensor, samples: int) -> Tensor:
    """The shares (groups,) for moments (groups, n, n)."""
    size = moments.shape[-1]
    square = moments.double().square().sum(dim=(1, 2))
    trace = moments.double().diagonal(dim1=1, dim2=2).sum(dim=1).square()
    wanted = (1 - 2 / size) * square + trace
    spread = (samples + 1 - 2 / size) * (square - trace / size)
    return torch.where(spread > wanted, wanted / spread.clamp_min(1e-300), 1.0).to(moments)


@dataclass(frozen=True, eq=False)
class KroneckerFisher:
    """The moments of a convolution's ``input`` and of the gradients at its ``output``, in nats for one sample.

    Of group's channels: a plain one has ``input`` of size in · kernel and ``output`` of size out, a transposed one
    ``input`` of size in and ``output`` of size out · kernel.
    """

    input: KroneckerMoment
    output: KroneckerMoment

    def check(self, spec: ConvSpec) -> None:
        """Raise SpecError unless these are moments for that convolution."""
        block, positions = spec.block, math.prod(spec.kernel_size)
        needed = (
            (block.in_channels, block.out_channels * positions)
            if spec.transposed
            else (
                block.in_channels * positions,
                block.out_channels,
            )
        )
        found = (self.input.size, self.output.size)
        groups = {factor.shape[0] for factor in (*self.input.factors, *self.output.factors)}
        if found != needed or groups != {spec.groups}:
            raise SpecError(
                f"{spec} needs moments of sizes {needed} for {spec.groups} groups, got {found} for {sorted(groups)}. "
                "Collect them on this network."
            )

    def of_group(self, group: int) -> KroneckerFisher:
        """The metric of one group."""
        return KroneckerFisher(self.input.of_group(group), self.output.of_group(group))

    def like(self, tensor: Tensor) -> KroneckerFisher:
        """In the dtype and on the device of ``tensor``."""
        return KroneckerFisher(self.input.like(tensor), self.output.like(tensor))

    def damped(self, amount: float) -> KroneckerFisher:
        """Both moments ``damped``."""
        return KroneckerFisher(self.input.damped(amount), self.output.damped(amount))

    def sides(self, spec: ConvSpec) -> tuple[KroneckerMoment, KroneckerMoment]:
        """The moments of the rows and of the columns of ``as_matrix``."""
        return (self.input, self.output) if spec.transposed else (self.output, self.input)

    def square(self, spec: ConvSpec, difference: Tensor) -> Tensor:
        """tr(G Δ C Δᵀ) for one group's difference of kernels (out, in, *kernel)."""
        rows, columns = self.sides(spec)
        matrix = as_matrix(spec, difference)
        return (columns.after(matrix) * rows.after(matrix.T).T).sum()

    def loss_increase(self, spec: ConvSpec, difference: Tensor) -> float:
        """By how much the loss of a sample grows, in nats: ½ tr(G Δ C Δᵀ), summed over groups.

        ``difference`` is of two kernels (out, in / groups, *kernel).
        """
        parts = difference.chunk(spec.groups)
        squares = [self.of_group(k).like(part).square(spec.block, part) for k, part in enumerate(parts)]
        return max(0.0, float(torch.stack(squares).double().sum()) / 2)


def as_matrix(spec: ConvSpec, kernel: Tensor) -> Tensor:
    """(out, in · kernel) of a kernel (out, in, *kernel); of a transposed convolution (in, out · kernel)."""
    return (kernel.transpose(0, 1) if spec.transposed else kernel).flatten(1)


def sqrt_and_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a positive semidefinite matrix and its inverse, eigenvalues below 1e-7 times the
    largest raised to that.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    values = values.clamp_min(float(values[-1].clamp_min(torch.finfo(torch.float64).tiny)) * _LEAST).sqrt()
    pair: Sequence[Tensor] = [(vectors * scale) @ vectors.T for scale in (values, 1 / values)]
    return pair[0].to(matrix), pair[1].to(matrix)
