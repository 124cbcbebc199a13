"""The distributions that a network's outputs can have, on tensors of shape (samples, channels, *positions)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor

_FISHER_TEMPERATURE, _DISTILLATION_TEMPERATURE = 2.0, 4.0
_LEAST_UNCERTAINTY = 1e-3  # mean of 1 − max p over all predictions, at the temperature of the Fisher information
_LEAST_SHARE = 0.08  # of the predictions among which that uncertainty is spread
_LARGEST_SCALE = 2.0**20


class Distribution(ABC):
    """What one output of a network predicts. All tensors are (samples, channels, *positions).

    Attributes:
        name: The name by which users and files refer to it.
        title: How plans print it.
    """

    name: ClassVar[str]

    @property
    def title(self) -> str:
        """How a plan prints the distribution."""
        return self.name.capitalize()

    @abstractmethod
    def fitted(self, values: Tensor) -> Distribution:
        """Return the distribution with its scales fitted to the original's output."""

    @abstractmethod
    def draw(self, values: Tensor, normal: Tensor) -> Tensor:
        """Return a random gradient with respect to ``values``, whose covariance is the Fisher information.

        ``normal`` holds standard normal numbers in the shape of ``values``.
        """

    @abstractmethod
    def divergence(self, expected: Tensor, found: Tensor) -> Tensor:
        """Return the KL divergence of ``found`` from ``expected`` for each sample (n,), in nats."""

    def training_loss(self, expected: Tensor, found: Tensor) -> Tensor:
        """Return the loss that distillation minimizes, for each sample (n,)."""
        return self.divergence(expected, found)

    @abstractmethod
    def information(self, values: Tensor) -> float:
        """Return how far the predictions are from their mean over all samples, in nats per sample.

        It is the divergence of a network that always predicts the mean: what there is to lose.
        """


@dataclass(frozen=True)
class _Events(Distribution):
    """A distribution of events, which logits describe. Subclasses say what the logits of an output are.

    Attributes:
        form: What the numbers of the output are: 'logits', 'probabilities' or 'log-probabilities'.
        scale: A divisor of the logits. It is above 1 if the network is so certain of every prediction that hardly any
            gradient would be left.
    """

    form: str
    scale: float = 1.0

    @abstractmethod
    def logits(self, values: Tensor) -> Tensor:
        """Return the logits of an output, divided by the scale."""

    @abstractmethod
    def _uncertainties(self, logits: Tensor) -> Tensor:
        """Return for every prediction the probability that something else happens than what is most probable."""

    def fitted(self, values: Tensor) -> Self:
        """Return the distribution with the smallest scale at which the predictions keep some uncertainty."""

        def uncertainties(scale: float) -> Tensor:
            return self._uncertainties(replace(self, scale=scale).logits(values) / _FISHER_TEMPERATURE)

        return replace(self, scale=_scale_for(uncertainties))

    def _title(self, title: str) -> str:
        return title if self.scale == 1 else f"{title} at temperature {self.scale:.3g}"


@final
@dataclass(frozen=True)
class Categorical(_Events):
    """One of the channels, at every position.

    The Fisher information is diag(p) − p pᵀ. Gradients are drawn as √p ∘ ε − p (√pᵀ ε) with ε ~ N(0, 1). They have the
    same covariance as the gradients for sampled labels, without their rare large values. A network is more certain on
    its training data than on other data, and than after factorization, so p is taken at temperature 2.

    Attributes:
        form: 'logits', 'probabilities' or 'log-probabilities'. The logarithm of a probability serves as its logit.
    """

    form: str = "logits"
    name = "categorical"

    @property
    def title(self) -> str:
        """How a plan prints the distribution."""
        return self._title(f"categorical ({self.form})")

    def logits(self, values: Tensor) -> Tensor:
        """Return the logits of an output."""
        return (values.clamp_min(1e-30).log() if self.form == "probabilities" else values) / self.scale

    def _uncertainties(self, logits: Tensor) -> Tensor:
        return 1 - logits.softmax(1).amax(1)

    def draw(self, values: Tensor, normal: Tensor) -> Tensor:
        """Return a random gradient, as the class describes."""
        p = F.softmax(self.logits(values) / _FISHER_TEMPERATURE, dim=1)
        noise = p.sqrt() * normal
        gradient = (noise - p * noise.sum(dim=1, keepdim=True)) / self.scale
        return gradient / values.clamp_min(1e-30) if self.form == "probabilities" else gradient

    def divergence(self, expected: Tensor, found: Tensor) -> Tensor:
        """Return the KL divergence of the classes for each sample (n,)."""
        return self._divergence(expected, found, 1.0)

    def training_loss(self, expected: Tensor, found: Tensor) -> Tensor:
        """Return the divergence at temperature 4, times 4².

        At that temperature less likely classes count as well (Hinton, Vinyals and Dean 2015).
        """
        return _DISTILLATION_TEMPERATURE**2 * self._divergence(expected, found, _DISTILLATION_TEMPERATURE)

    def information(self, values: Tensor) -> float:
        """Return the mean divergence of the mean prediction."""
        log_p = F.log_softmax(self.logits(values), dim=1)
        mean = _channel_mean(log_p.exp()).clamp_min(1e-30).log()
        return float((log_p.exp() * (log_p - mean)).sum()) / len(values)

    def _divergence(self, expected: Tensor, found: Tensor, temperature: float) -> Tensor:
        q, p = (F.log_softmax(self.logits(values) / temperature, dim=1) for values in (found, expected))
        return (p.exp() * (p - q)).flatten(1).sum(1)


@final
@dataclass(frozen=True)
class Bernoulli(_Events):
    """An independent event for every number, which is its probability.

    As for Categorical, the Fisher information p (1 − p) is that of a softened p: its logit is divided by 2.

    Attributes:
        form: 'probabilities', or 'logits'.
    """

    form: str = "probabilities"
    name = "bernoulli"

    @property
    def title(self) -> str:
        """How a plan prints the distribution."""
        return self._title("Bernoulli (logits)" if self.form == "logits" else "Bernoulli")

    def logits(self, values: Tensor) -> Tensor:
        """Return the logits of an output."""
        return (torch.logit(values, eps=1e-7) if self.form == "probabilities" else values) / self.scale

    def _uncertainties(self, logits: Tensor) -> Tensor:
        return (-logits.abs()).sigmoid()

    def draw(self, values: Tensor, normal: Tensor) -> Tensor:
        """Return a random gradient, as the class describes."""
        logits = self.logits(values) / _FISHER_TEMPERATURE
        gradient = (logits.sigmoid() * (-logits).sigmoid()).sqrt() * normal / self.scale
        if self.form == "logits":
            return gradient
        p = values.clamp(1e-7, 1 - 1e-7)
        return gradient / (p * (1 - p))

    def divergence(self, expected: Tensor, found: Tensor) -> Tensor:
        """Return the KL divergence of all events for each sample (n,)."""
        p, q = self.logits(expected), self.logits(found)
        per_event = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q)) + (-p).sigmoid() * (
            F.logsigmoid(-p) - F.logsigmoid(-q)
        )
        return per_event.flatten(1).sum(1)

    def information(self, values: Tensor) -> float:
        """Return the mean divergence of the mean prediction of each channel."""
        p = self.logits(values).sigmoid()
        mean = _channel_mean(p).clamp(1e-12, 1 - 1e-12)
        per_event = torch.xlogy(p, p / mean) + torch.xlogy(1 - p, (1 - p) / (1 - mean))
        return float(per_event.sum()) / len(values)


@final
@dataclass(frozen=True)
class Gaussian(Distribution):
    """Every number is normally distributed, with a variance for each channel.

    Attributes:
        variances: The variances (channels,).
    """

    variances: tuple[float, ...] = (1.0,)
    name = "gaussian"

    def fitted(self, values: Tensor) -> Gaussian:
        """Return the distribution with the variance of each channel over the samples.

        The variance is taken at every position and averaged over positions. Two corrections make it robust. The
        variance of a channel that is rarely active comes from few samples, so its standard error, which grows with the
        kurtosis, is added twice. A channel that is constant has no variance of its own, and gets the largest one.
        """
        values = values.flatten(2) if values.ndim > 2 else values[:, :, None]
        centered = values - (values.mean(0) if len(values) > 1 else _channel_mean(values))
        if not bool(centered.any()):
            centered = values
        variance = centered.square().sum((0, 2)) / (max(1, len(values) - 1) * values.shape[2])
        kurtosis = centered.pow(4).mean((0, 2)) / centered.square().mean((0, 2)).square().clamp_min(1e-300)
        variance = variance * (1 + 2 * ((kurtosis - 3).clamp_min(0) / len(values)).sqrt())
        largest = float(variance.max()) or 1.0
        constant = variance <= 1e-10 * values.square().mean((0, 2))
        return Gaussian(tuple(variance.masked_fill(constant, largest).clamp_min(1e-12 * largest).tolist()))

    def draw(self, values: Tensor, normal: Tensor) -> Tensor:
        """Return normal gradients whose variance is the inverse of the variance of the numbers."""
        return normal * self._precision(values).sqrt()

    def divergence(self, expected: Tensor, found: Tensor) -> Tensor:
        """Return half the squared distance over the variance for each sample (n,)."""
        return ((found - expected).square() * self._precision(expected)).flatten(1).sum(1) / 2

    def information(self, values: Tensor) -> float:
        """Return ½ for each number, which is the expected divergence of the mean."""
        return values[0].numel() / 2

    def _precision(self, values: Tensor) -> Tensor:
        return 1 / values.new_tensor(self.variances).reshape(-1, *[1] * (values.ndim - 2))


def _scale_for(uncertainties: Callable[[float], Tensor]) -> float:
    """Return the smallest scale from 1 on with enough uncertainty, to 1 %.

    The uncertainty must not come from a few predictions alone: the others would have no gradient. It is spread among
    (Σ u)² / Σ u² predictions.
    """

    def is_enough(scale: float) -> bool:
        u = uncertainties(scale)
        total = float(u.sum())
        spread = total**2 / max(float(u.square().sum()), 1e-300)
        return total >= _LEAST_UNCERTAINTY * u.numel() and spread >= _LEAST_SHARE * u.numel()

    low, high = 1.0, 1.0
    while not is_enough(high) and high < _LARGEST_SCALE:
        low, high = high, 2 * high
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return float(f"{high:.3g}")


def _channel_mean(values: Tensor) -> Tensor:
    """Return the mean of each channel over samples and positions (1, channels, *1)."""
    return values.mean([axis for axis in range(values.ndim) if axis != 1], keepdim=True)
