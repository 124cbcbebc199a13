"""Likelihoods: what measures how far an output is from the original's, and which errors in it matter."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from fxfact.calibration.output_parts import OutputPart, describe
from fxfact.calibration.outputs import read_outputs
from fxfact.capture import ExampleInputs, samples_of
from fxfact.errors import CalibrationError
from fxfact.utils import map_tensors, named_tensors, tensors_of

Normal = Callable[[Tensor], Tensor]  # returns standard normal numbers in the shape of a tensor (samples, …)
_KRYLOV_STEPS = 16


class Likelihood(ABC):
    """How the output of a network is read: as a distribution of what it predicts.

    Subclass it, or pass any object with the methods ``draw`` and ``divergence``, to say it yourself.
    """

    @abstractmethod
    def draw(self, output: Any, normal: Normal) -> Sequence[tuple[Tensor, Tensor]]:
        """Draw random gradients with respect to the output.

        Args:
            output: what the network returns for a batch.
            normal: returns standard normal numbers in the shape of a tensor ``(samples, …)``.

        Returns:
            Tensors of the output, each with a random gradient. The covariance of the gradients of one sample must be
            its Fisher information: the curvature of the divergence where both outputs are equal.
        """

    @abstractmethod
    def divergence(self, expected: Any, found: Any) -> Tensor:
        """Measure how far an output is from the original's.

        Args:
            expected: the original's output.
            found: the output of another network for the same batch.

        Returns:
            The divergence of each sample ``(n,)``, in nats.
        """

    def training_loss(self, expected: Any, found: Any) -> Tensor:
        """Measure what distillation minimizes. By default it is the divergence.

        Args:
            expected: the original's output.
            found: the output of the factorized network for the same batch.

        Returns:
            The loss of each sample ``(n,)``.
        """
        return self.divergence(expected, found)

    def count_samples(self, output: Any, batch: ExampleInputs) -> int:
        """Count the samples of a batch. By default it is the first size of its first tensor.

        Args:
            output: what the network returns for the batch.
            batch: the arguments of the network.

        Returns:
            The number of samples.
        """
        return samples_of(batch)


@final
class OutputLikelihood(Likelihood):
    """A distribution for every part of the output, as ``read_outputs`` finds them.

    Attributes:
        parts: the parts, fitted to outputs.
    """

    def __init__(self, parts: Sequence[OutputPart]) -> None:
        self.parts = tuple(parts)
        self._used = [part for part in parts if part.distribution is not None]

    def __str__(self) -> str:
        return describe(self.parts)

    def without_detached(self, output: Any) -> OutputLikelihood:
        """Leave out the parts that no gradient flows from. Raises CalibrationError if none is left."""
        detached = {name for name, tensor in named_tensors(output) if not tensor.requires_grad}
        reason = "no gradient flows from it to a convolution"
        parts = [
            replace(part, distribution=None, reason=reason) if part in self._used and part.name in detached else part
            for part in self.parts
        ]
        if all(part.distribution is None for part in parts):
            raise CalibrationError(
                f"calibration: no gradient flows from the outputs to a convolution: {describe(self._used)}. If "
                "forward() detaches its output, or computes it from gradients of its own, plan without data."
            )
        return OutputLikelihood(parts)

    def count_samples(self, output: Any, batch: ExampleInputs) -> int:
        """Return the number of samples in the output. Raises CalibrationError if its parts disagree."""
        counts = {part.name: len(view) for part, view in self._views(output)}
        if len(set(counts.values())) > 1:
            raise CalibrationError(f"the outputs have different numbers of samples: {counts}. Pass likelihood=.")
        return next(iter(counts.values()))

    def draw(self, output: Any, normal: Normal) -> list[tuple[Tensor, Tensor]]:
        """Return every tensor with a random gradient. Several parts of a tensor share one."""
        tensors = dict(named_tensors(output))
        gradients: dict[str, Tensor] = {}
        for part, view in self._views(output):
            assert part.distribution is not None
            values = view.detach().float()
            drawn = part.weight**0.5 * part.distribution.draw(values, normal(values).to(values.dtype))
            whole = gradients.setdefault(
                part.name, torch.zeros_like(tensors[part.name], memory_format=torch.contiguous_format)
            )
            part.view(whole).copy_(drawn)
        return [(tensors[name], gradient) for name, gradient in gradients.items()]

    def divergence(self, expected: Any, found: Any) -> Tensor:
        """Return the weighted sum of the divergences of all parts."""
        return self._sum(expected, found, "divergence")

    def training_loss(self, expected: Any, found: Any) -> Tensor:
        """Return the weighted sum of the losses that distillation minimizes."""
        return self._sum(expected, found, "training_loss")

    def _sum(self, expected: Any, found: Any, method: str) -> Tensor:
        pairs = zip(self._views(expected), self._views(found), strict=True)
        parts = [
            part.weight * getattr(part.distribution, method)(one.double(), other.double())
            for (part, one), (_, other) in pairs
        ]
        return torch.stack(parts).sum(0)

    def _views(self, output: Any) -> list[tuple[OutputPart, Tensor]]:
        tensors = dict(named_tensors(output))
        for part in self._used:
            if part.name not in tensors or tensors[part.name].ndim != len(part.shape):
                found = tuple(tensors[part.name].shape) if part.name in tensors else "missing"
                raise CalibrationError(
                    f"output {part.name!r} was {part.shape} in the first batch and is {found} in another. Leave it "
                    f"out: likelihood={{{part.name!r}: None}}."
                )
        return [(part, part.view(tensors[part.name])) for part in self._used]


@final
class CustomLoss(Likelihood):
    """A function that maps the output to a scalar, the loss summed over all samples. Its own gradient is used."""

    def __init__(self, loss: Callable[[Any], Tensor]) -> None:
        self._loss = loss

    def draw(self, output: Any, normal: Normal) -> list[tuple[Tensor, Tensor]]:
        """Return the loss and the gradient 1."""
        try:
            loss = self._loss(output)
        except Exception as error:
            raise CalibrationError(f"likelihood: the function failed on the model's output: {error!r}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise CalibrationError(
                "likelihood: the function must return a scalar tensor that is computed from the output without detach()"
            )
        return [(loss, torch.ones_like(loss))]

    def divergence(self, expected: Any, found: Any) -> Tensor:
        """Raise CalibrationError, because a loss of one output does not compare two."""
        raise CalibrationError(
            "likelihood: a function of one output gives gradients, but it cannot measure how far two outputs are "
            "apart. Pass a function divergence(expected, found) that returns one number for each sample. fxfact.plan "
            "can still choose ranks by yours: pass calibration=fxfact.calibrate(model, batches, likelihood=yours), "
            "another likelihood=, held_out= and example_inputs=."
        )


@final
class CustomDivergence(Likelihood):
    """A differentiable function ``divergence(expected, found) -> (n,)``.

    The gradients are drawn from its curvature H where both outputs are equal: H^½ ε with ε ~ N(0, 1), by the Lanczos
    method for functions of a matrix (Higham 2008, Functions of Matrices, chapter 13), from products of H with vectors.
    """

    def __init__(self, function: Callable[[Any, Any], Tensor]) -> None:
        self._function = function

    def draw(self, output: Any, normal: Normal) -> list[tuple[Tensor, Tensor]]:
        """Return the floating-point tensors, each with a random gradient."""
        tensors = [tensor for tensor in tensors_of(output) if tensor.is_floating_point() and tensor.requires_grad]
        if not tensors:
            return []
        with torch.enable_grad():
            points = {id(tensor): tensor.detach().double().requires_grad_() for tensor in tensors}
            expected = map_tensors(Tensor.detach, output)
            expected = map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, expected)
            found = map_tensors(lambda tensor: points.get(id(tensor), tensor), output)
            total = self.divergence(expected, found).sum()
            if not total.requires_grad:
                raise CalibrationError("likelihood: the divergence does not depend on its second argument")
            inputs = list(points.values())
            slopes = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
        flat = _Flat(inputs)

        def curvature(vectors: Tensor) -> Tensor:
            used = [(slope, part) for slope, part in zip(slopes, flat.split(vectors), strict=True) if slope is not None]
            used = [(slope, part) for slope, part in used if slope.requires_grad]
            if not used:
                raise CalibrationError(
                    "likelihood: the divergence has no curvature where both outputs are equal. Pass one that grows "
                    "with the squared difference there."
                )
            products = torch.autograd.grad(
                [slope for slope, _ in used],
                inputs,
                [part for _, part in used],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            return flat.join(products)

        noise = flat.join([normal(tensor).to(tensor.dtype) for tensor in inputs])
        gradients = flat.split(_root_product(curvature, noise))
        return [(tensor, gradient.to(tensor.dtype)) for tensor, gradient in zip(tensors, gradients, strict=True)]

    def divergence(self, expected: Any, found: Any) -> Tensor:
        """Return what the function returns. Raises CalibrationError unless it is one number ≥ 0 for each sample."""
        try:
            result = self._function(expected, found)
        except Exception as error:
            raise CalibrationError(f"likelihood: the divergence failed on the model's outputs: {error!r}") from error
        if not isinstance(result, Tensor) or result.ndim != 1:
            shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise CalibrationError(f"likelihood: the divergence must return one number a sample (n,), got {shape}")
        if bool((result.detach() < -1e-6).any()):
            raise CalibrationError(
                f"likelihood: the divergence is negative ({float(result.detach().min()):.3g}). It must be 0 where both "
                "outputs are equal, and positive elsewhere."
            )
        return result


class _Flat:
    """Joins tensors (n, …) to one matrix (n, numbers), and splits such a matrix."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._shapes = [tensor.shape for tensor in like]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.reshape(len(tensor), -1) for tensor in tensors], dim=1)

    def split(self, matrix: Tensor) -> list[Tensor]:
        parts = torch.split(matrix, [shape[1:].numel() for shape in self._shapes], dim=1)
        return [part.reshape(shape) for part, shape in zip(parts, self._shapes, strict=True)]


def _root_product(product: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    """Return H^½ v for every row v (n, numbers), where ``product`` returns H v. All rows run side by side."""
    norms = vectors.norm(dim=1, keepdim=True)
    basis = [vectors / norms.clamp_min(1e-300)]
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    for _ in range(min(_KRYLOV_STEPS, vectors.shape[1])):
        image = product(basis[-1])
        diagonal.append((image * basis[-1]).sum(1))
        for _ in range(2):  # a second time against rounding
            for known in basis:
                image = image - (image * known).sum(1, keepdim=True) * known
        length = image.norm(dim=1, keepdim=True)
        finished = length <= 1e-10 * diagonal[0].abs()[:, None].clamp_min(1e-300)
        basis.append(torch.where(finished, 0.0, image / length.clamp_min(1e-300)))
        off.append(torch.where(finished, 0.0, length)[:, 0])
    off.pop()
    matrix = torch.diag_embed(torch.stack(diagonal, 1))
    if off:
        sides = torch.stack(off, 1)
        matrix = matrix + torch.diag_embed(sides, 1) + torch.diag_embed(sides, -1)
    values, axes = torch.linalg.eigh(matrix)
    if float(values.min()) < -1e-3 * float(values.abs().max()):
        raise CalibrationError(
            "likelihood: the curvature of the divergence is negative where both outputs are equal, so it is not the "
            "smallest there. Pass a divergence that is 0 for equal outputs and positive for others."
        )
    roots = torch.einsum("nik,nk,nk->ni", axes, values.clamp_min(0).sqrt(), axes[:, 0])
    result: Tensor = norms * torch.einsum("ni,ind->nd", roots, torch.stack(basis[:-1]))
    return result


@final
class _DuckTyped(Likelihood):
    """An object of the caller's with the methods of a likelihood."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def draw(self, output: Any, normal: Normal) -> Sequence[tuple[Tensor, Tensor]]:
        result: Sequence[tuple[Tensor, Tensor]] = self._own.draw(output, normal)
        return result

    def divergence(self, expected: Any, found: Any) -> Tensor:
        result: Tensor = self._own.divergence(expected, found)
        return result


def own_likelihood(request: object) -> Likelihood | None:
    """Return the likelihood that a caller passed as an object or a function, or None if the outputs are to be read.

    Raises CalibrationError for a request of another type.
    """
    if isinstance(request, Likelihood):
        return request
    if callable(getattr(request, "draw", None)) and callable(getattr(request, "divergence", None)):
        return _DuckTyped(request)
    if callable(request):
        return CustomDivergence(request) if _argument_count(request) == 2 else CustomLoss(request)
    if request is None or isinstance(request, str | Mapping | Sequence):
        return None
    raise CalibrationError(
        f"likelihood cannot be {request!r}. Pass the name of a distribution, a mapping from outputs to names, a "
        "function divergence(expected, found), or an object with the methods draw and divergence."
    )


def resolve_likelihood(request: object, network: nn.Module, batches: Sequence[ExampleInputs]) -> Likelihood:
    """Return the likelihood for a request, read from the outputs of a network if the caller passed none of its own.

    Raises CalibrationError.
    """
    return own_likelihood(request) or OutputLikelihood(read_outputs(network, batches, request))


def parts_of(likelihood: Likelihood | None) -> tuple[OutputPart, ...]:
    """Return the parts of the output that a likelihood knows, without their fit; none for one of the caller's own."""
    parts = likelihood.parts if isinstance(likelihood, OutputLikelihood) else ()
    return tuple(part.without_fit() for part in parts)


def _argument_count(function: Callable[..., Any]) -> int:
    """Return the number of positional arguments without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in positional and parameter.default is parameter.empty for parameter in parameters)
