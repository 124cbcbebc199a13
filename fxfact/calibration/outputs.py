"""What an output means: the distribution whose Fisher information says which errors matter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfact.capture import ExampleInputs, samples_of
from fxfact.errors import CalibrationError
from fxfact.utils import tensors_of

Draw = Callable[[Tensor], Tensor]  # returns standard normal numbers in the shape of a tensor
_FISHER_TEMPERATURE, _DISTILLATION_TEMPERATURE = 2.0, 4.0


class Likelihood(ABC):
    """How the output of a network is read: as a distribution of what it predicts."""

    name: ClassVar[str]
    shrinkage: ClassVar[float] = 0.5  # least shrinkage of the gradients' moments towards a multiple of the identity

    @abstractmethod
    def sample_gradients(self, output: Any, draw: Draw) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return tensors of the output, and a random gradient for each.

        The covariance of the gradients times ``fisher_scale`` is the Fisher information of one sample.
        """

    def count_samples(self, output: Any, batch: ExampleInputs) -> int:
        """Return the number of samples in an output, which the network gave for ``batch``."""
        return len(float_tensors_of(output)[0])

    def fisher_scale(self, variance: float) -> float:
        """Return the factor for the second moments of the gradients, given the variance of the output."""
        return 1.0

    def divergence(self, expected: Any, found: Any, variance: float) -> Tensor:
        """Return the KL divergence of ``found`` from the original's output ``expected``, for each sample (n,), in nats.

        Raises CalibrationError if the likelihood cannot measure.
        """
        raise CalibrationError(
            f"a likelihood of your own ({self.name}) gives gradients, but it cannot measure a loss. Pass "
            "likelihood='categorical' or 'gaussian'. fxfact.plan can still choose ranks by your own: pass besides "
            "calibration=fxfact.calibrate(model, batches, likelihood=yours), held_out= and example_inputs=."
        )

    def training_loss(self, expected: Any, found: Any, variance: float) -> Tensor:
        """Return the loss that distillation minimizes, for each sample (n,). By default it is the divergence."""
        return self.divergence(expected, found, variance)


@final
class Categorical(Likelihood):
    """Logits over classes on axis 1: (n, classes), or (n, classes, *positions) with a distribution at every position.

    The Fisher information is diag(p) − p pᵀ. Gradients are drawn as √p ∘ ε − p (√pᵀ ε) with ε ~ N(0, 1). They have the
    same covariance as the gradients for sampled labels, without their rare large values. A network is more certain on
    its training data than on other data, and than after factorization, so p is taken at temperature 2.
    """

    name = "categorical"

    def count_samples(self, output: Any, batch: ExampleInputs) -> int:
        """Return the number of samples that there are logits for."""
        return len(logits_of(output))

    def sample_gradients(self, output: Any, draw: Draw) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the logits and a random gradient, as the class describes."""
        logits = logits_of(output)
        p = F.softmax(logits.detach().float() / _FISHER_TEMPERATURE, dim=1)
        noise = p.sqrt() * draw(logits)
        return [logits], [(noise - p * noise.sum(dim=1, keepdim=True)).to(logits.dtype)]

    def divergence(self, expected: Any, found: Any, variance: float) -> Tensor:
        """Return the KL divergence of the classes, summed over positions, for each sample (n,)."""
        return _kl_divergence(expected, found, 1.0)

    def training_loss(self, expected: Any, found: Any, variance: float) -> Tensor:
        """Return the divergence at temperature 4, times 4².

        At that temperature less likely classes count as well (Hinton, Vinyals and Dean 2015).
        """
        return _DISTILLATION_TEMPERATURE**2 * _kl_divergence(expected, found, _DISTILLATION_TEMPERATURE)


@final
class Gaussian(Likelihood):
    """Every number of every floating-point tensor is normally distributed, with the variance of the whole output."""

    name = "gaussian"

    def sample_gradients(self, output: Any, draw: Draw) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the floating-point tensors and standard normal gradients."""
        tensors = float_tensors_of(output)
        return tensors, [draw(tensor).to(tensor.dtype) for tensor in tensors]

    def fisher_scale(self, variance: float) -> float:
        """Return 1 / variance."""
        return 1 / variance if variance > 0 else 1.0

    def divergence(self, expected: Any, found: Any, variance: float) -> Tensor:
        """Return half the squared distance over the variance, summed over the output, for each sample (n,)."""
        pairs = zip(float_tensors_of(expected), float_tensors_of(found), strict=True)
        squares = [(other - one).double().square().reshape(len(one), -1).sum(dim=1) for one, other in pairs]
        if len({len(square) for square in squares}) > 1:
            raise CalibrationError(
                f"likelihood='gaussian': the output's tensors have {sorted({len(square) for square in squares})} "
                "samples on their first axis. Pass a model whose output tensors all have the batch on the first axis."
            )
        return torch.stack(squares).sum(dim=0) / 2 * self.fisher_scale(variance)


@final
class CustomLoss(Likelihood):
    """A function that maps the output to a scalar, the loss summed over all samples. Its own gradient is used."""

    name = "callable"

    def __init__(self, loss: Callable[[Any], Tensor]) -> None:
        self._loss = loss

    def count_samples(self, output: Any, batch: ExampleInputs) -> int:
        """Return the number of samples in the batch, because nothing is known about the output."""
        return samples_of(batch)

    def sample_gradients(self, output: Any, draw: Draw) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the loss and the gradient 1."""
        try:
            loss = self._loss(output)
        except Exception as error:
            raise CalibrationError(f"likelihood: the function failed on the model's output: {error!r}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise CalibrationError(
                "likelihood: the function must return a scalar tensor that depends differentiably on the output. "
                "Return a sum over the samples, computed from the output without detach(), argmax or rounding."
            )
        return [loss], [torch.ones_like(loss)]


CATEGORICAL, GAUSSIAN = Categorical(), Gaussian()
_FUNCTION = "a function of the output that returns a scalar loss"


def parse_likelihood(request: object) -> Likelihood | None:
    """Return the likelihood for a caller's request, or None if the output has to determine it.

    Raises CalibrationError.
    """
    if request is None or isinstance(request, Likelihood):
        return request
    by_name = {known.name: known for known in (CATEGORICAL, GAUSSIAN)}
    if isinstance(request, str) and request in by_name:
        return by_name[request]
    if callable(request):
        return CustomLoss(request)
    if request == CustomLoss.name:
        raise CalibrationError(
            "the statistics were collected with a likelihood of your own, which gives gradients, but cannot measure a "
            "loss. Pass 'categorical' or 'gaussian' for measuring, or leave out held_out (a Loss budget needs it)."
        )
    raise CalibrationError(
        f"likelihood cannot be {request!r}. Pass 'categorical' (classes on axis 1), 'gaussian' (numbers), or "
        f"{_FUNCTION}."
    )


def likelihood_for(request: object, output: Any, *, measures: bool = False) -> Likelihood:
    """Return the requested likelihood, or the categorical one if the output is, or has, logits of shape (n, classes).

    ``measures`` says that it has to measure a loss, which a function cannot. Raises CalibrationError.
    """
    known = parse_likelihood(request)
    float_tensors_of(output)
    if known is not None:
        return known
    logits = _named_logits(output)
    logits = output if logits is None else logits
    if isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] > 1 and logits.is_floating_point():
        return CATEGORICAL
    shapes = [tuple(tensor.shape) for tensor in tensors_of(output)]
    names = ["'categorical' (classes on axis 1)"] if _is_logits(_logits_among(output)) else []
    ways = [*names, "'gaussian' (numbers)", *([] if measures else [_FUNCTION])]
    raise CalibrationError(
        f"the model's output, {shapes}, does not determine its loss. Pass likelihood={_one_of(ways)}."
    )


def logits_of(output: Any) -> Tensor:
    """Return the tensor of logits in an output. Raises CalibrationError."""
    found = _logits_among(output)
    if not _is_logits(found):
        shapes = [tuple(tensor.shape) for tensor in found]
        raise CalibrationError(
            f"likelihood='categorical' needs one tensor of logits (n, classes, …), got {shapes}. Pass "
            "likelihood='gaussian', or return nothing else than the logits."
        )
    return found[0]


def _logits_among(output: Any) -> list[Tensor]:
    """Return the tensors that could be the logits: the one of this name, or all floating-point ones."""
    named = _named_logits(output)
    return [named] if named is not None else [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]


def _is_logits(found: Sequence[Tensor]) -> bool:
    return len(found) == 1 and found[0].ndim > 1 and found[0].shape[1] > 1


def _one_of(ways: Sequence[str]) -> str:
    return " or ".join([", ".join(ways[:-1]), ways[-1]] if len(ways) > 1 else ways)


def float_tensors_of(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of an output.

    Raises CalibrationError if there are none. The message says what the model could return instead.
    """
    tensors = list(tensors_of(output))
    found = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.ndim > 0]
    if found:
        return found
    kinds = ", ".join(f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in tensors)
    if any(tensor.is_floating_point() for tensor in tensors):
        way_out = "Return one value for each sample (n,) instead of their sum or mean."
    elif any(tensor.is_complex() for tensor in tensors):
        way_out = "Return the real and imaginary parts: torch.view_as_real(output)."
    else:
        way_out = "Return the numbers that they are computed from: the logits instead of their argmax, for example."
    raise CalibrationError(
        f"the model returns {kinds or 'no tensors'}, and every likelihood needs a floating-point tensor with the "
        f"samples on its first axis. {way_out}"
    )


def sums_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the count, the sum and the sum of squares of all numbers in the tensors: (3,), on the CPU."""
    sums = [
        torch.stack([t.new_tensor(t.numel()).double(), t.double().sum(), t.double().square().sum()]) for t in tensors
    ]
    return torch.stack(sums).sum(dim=0).cpu()


def variance_of(sums: Tensor) -> float:
    """Return the variance of the numbers that ``sums_of`` summed up."""
    count, total, squares = sums.tolist()
    return max(0.0, squares / count - (total / count) ** 2) if count else 0.0


def _kl_divergence(expected: Any, found: Any, temperature: float) -> Tensor:
    q, p = (F.log_softmax(logits_of(output).double() / temperature, dim=1) for output in (found, expected))
    return (p.exp() * (p - q)).flatten(1).sum(dim=1)


def _named_logits(output: Any) -> Tensor | None:
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return named if isinstance(named, Tensor) else None
