"""What an output says of the data: the distribution whose Fisher information tells which errors matter."""

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

Draw = Callable[[Tensor], Tensor]  # standard normal numbers, as many as the tensor has
_TEMPERATURE, _DISTILLED = 2.0, 4.0  # of gradients, and of what is learned


class Likelihood(ABC):
    """How a network's output is read."""

    name: ClassVar[str]
    shrinkage: ClassVar[float] = 0.5  # of the moments of gradients towards multiples of the identity, at least

    @abstractmethod
    def pull(self, output: Any, draw: Draw) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Tensors of the output, and for each a random gradient there, whose covariance is the Fisher information of
        one sample, but for ``scale``.
        """

    def samples(self, output: Any, batch: ExampleInputs) -> int:
        """How many an output is of, and the batch that it came from."""
        return len(float_tensors_of(output)[0])

    def scale(self, variance: float) -> float:
        """What second moments of these gradients are multiplied by, given the variance of the output."""
        return 1.0

    def divergence(self, expected: Any, found: Any, variance: float) -> Tensor:
        """By how much ``found`` is worse than the original's ``expected``: KL divergence by sample (n,), in nats."""
        raise CalibrationError(
            f"a likelihood of your own ({self.name}) tells gradients, not how to measure a loss. "
            "Pass 'categorical' or 'gaussian' for that."
        )

    def distance(self, expected: Any, found: Any, variance: float) -> Tensor:
        """What a network that learns from the original is to make small, by sample (n,): the divergence, unless another
        teaches more.
        """
        return self.divergence(expected, found, variance)


@final
class Categorical(Likelihood):
    """Logits over classes on axis 1: (n, classes), or (n, classes, *positions), each position for itself.

    Its Fisher information is diag(p) − p pᵀ. Gradients are drawn as √p ∘ ε − p (√pᵀ ε) with ε ~ N(0, 1), which has that
    covariance, as the gradients for sampled labels have, without their rare large events. A network is surer of the
    data that it was trained on than it will be, of others and once it is factorized: p is taken at temperature 2.
    """

    name = "categorical"

    def samples(self, output: Any, batch: ExampleInputs) -> int:
        """Those that there are logits of."""
        return len(logits_of(output))

    def pull(self, output: Any, draw: Draw) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """See the class."""
        logits = logits_of(output)
        p = F.softmax(logits.detach().float() / _TEMPERATURE, dim=1)
        noise = p.sqrt() * draw(logits)
        return [logits], [(noise - p * noise.sum(dim=1, keepdim=True)).to(logits.dtype)]

    def divergence(self, expected: Any, found: Any, variance: float) -> Tensor:
        """Summed over positions."""
        return _divergence(expected, found, 1.0)

    def distance(self, expected: Any, found: Any, variance: float) -> Tensor:
        """The divergence at temperature 4, times its square, which shows what is also likely (Hinton et al. 2015)."""
        return _DISTILLED**2 * _divergence(expected, found, _DISTILLED)


@final
class Gaussian(Likelihood):
    """Every number of every floating-point tensor of the output is normal, all with the variance of the output."""

    name = "gaussian"

    def pull(self, output: Any, draw: Draw) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """See the class."""
        tensors = float_tensors_of(output)
        return tensors, [draw(tensor).to(tensor.dtype) for tensor in tensors]

    def scale(self, variance: float) -> float:
        """One by the variance."""
        return 1 / variance if variance > 0 else 1.0

    def divergence(self, expected: Any, found: Any, variance: float) -> Tensor:
        """Half the squared distance by the variance, summed over the output."""
        pairs = zip(float_tensors_of(expected), float_tensors_of(found), strict=True)
        squares = [(other - one).double().square().reshape(len(one), -1).sum(dim=1) for one, other in pairs]
        if len({len(square) for square in squares}) > 1:
            raise CalibrationError(
                f"likelihood='gaussian': outputs have {sorted({len(square) for square in squares})} samples on their "
                "first axis. Give a model whose tensors all have the batch there."
            )
        return torch.stack(squares).sum(dim=0) / 2 * self.scale(variance)


@final
class OwnLoss(Likelihood):
    """A function of the output that gives a scalar, the summed loss of all samples: its gradient is taken as it is."""

    name = "callable"

    def __init__(self, loss: Callable[[Any], Tensor]) -> None:
        self._loss = loss

    def samples(self, output: Any, batch: ExampleInputs) -> int:
        """Those of the batch: nothing is known of the output."""
        return samples_of(batch)

    def pull(self, output: Any, draw: Draw) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """See the class."""
        try:
            loss = self._loss(output)
        except Exception as error:
            raise CalibrationError(f"likelihood: the function failed on the model's output: {error!r}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise CalibrationError("likelihood: the function must give a scalar tensor that depends on the output")
        return [loss], [torch.ones_like(loss)]


CATEGORICAL, GAUSSIAN = Categorical(), Gaussian()


_WAY_OUT = "Pass likelihood='categorical' (classes on axis 1), 'gaussian' (numbers), or a function that gives a loss."


def parse_likelihood(request: object) -> Likelihood | None:
    """The likelihood asked for, None where the output is to settle it. Raises CalibrationError."""
    if request is None or isinstance(request, Likelihood):
        return request
    by_name = {known.name: known for known in (CATEGORICAL, GAUSSIAN)}
    if isinstance(request, str) and request in by_name:
        return by_name[request]
    if callable(request):
        return OwnLoss(request)
    if request == OwnLoss.name:
        raise CalibrationError(
            "the statistics are of a likelihood of your own, which tells gradients, not how to measure a loss. Pass "
            "'categorical' or 'gaussian' to measure, or leave held_out away (a Loss needs it)."
        )
    raise CalibrationError(f"likelihood cannot be {request!r}. {_WAY_OUT}")


def likelihood_for(request: object, output: Any) -> Likelihood:
    """The likelihood asked for, or the one that an output settles: logits (n, classes), alone or so named.

    Raises CalibrationError.
    """
    known = parse_likelihood(request)
    if known is not None:
        return known
    logits = _named_logits(output)
    logits = output if logits is None else logits
    if isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] > 1 and logits.is_floating_point():
        return CATEGORICAL
    shapes = [tuple(tensor.shape) for tensor in tensors_of(output)]
    raise CalibrationError(f"the output, {shapes or 'no tensor'}, does not say what its loss is. {_WAY_OUT}")


def logits_of(output: Any) -> Tensor:
    """The tensor of logits in an output. Raises CalibrationError."""
    named = _named_logits(output)
    found = [named] if named is not None else [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]
    if len(found) != 1 or found[0].ndim < 2 or found[0].shape[1] < 2:
        shapes = [tuple(tensor.shape) for tensor in found]
        raise CalibrationError(
            f"likelihood='categorical' needs one tensor of logits (n, classes, …), got {shapes}. Pass 'gaussian', or a "
            "function of the output that gives a loss."
        )
    return found[0]


def float_tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output. Raises CalibrationError where there are none."""
    found = [tensor for tensor in tensors_of(output) if tensor.is_floating_point() and tensor.ndim > 0]
    if not found:
        raise CalibrationError(
            "the output holds no floating-point tensor with an axis for the samples, which it is judged by, 'gaussian' "
            "or not. Return one."
        )
    return found


def _divergence(expected: Any, found: Any, temperature: float) -> Tensor:
    q, p = (F.log_softmax(logits_of(output).double() / temperature, dim=1) for output in (found, expected))
    return (p.exp() * (p - q)).flatten(1).sum(dim=1)


def _named_logits(output: Any) -> Tensor | None:
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return named if isinstance(named, Tensor) else None
