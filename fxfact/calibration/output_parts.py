"""A part of a network's output, where it is, and the distribution that it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fxfact.calibration.distributions import Bernoulli, Categorical, Distribution, Gaussian

DISTRIBUTIONS = {known.name: known for known in (Categorical, Bernoulli, Gaussian)}


@dataclass(frozen=True, kw_only=True)
class OutputPart:
    """A tensor in the output of a network, or a block of its channels, and the distribution that it has.

    Attributes:
        name: Keys, indices and attributes joined by dots; "" for an output that is a tensor.
        shape: The shape in the first batch.
        distribution: The distribution. None: the tensor is left out.
        reason: Why it was read so.
        sample_axis: The axis of the samples.
        per_sample: How many entries that axis has for each sample.
        channel_axis: The axis of the classes or channels. None: there is one channel.
        channels: The first and the last channel (exclusive), if it is a block.
        weight: A factor for the divergence, so that none of several outputs drowns the others.
    """

    name: str
    shape: tuple[int, ...]
    distribution: Distribution | None = None
    reason: str = ""
    sample_axis: int = 0
    per_sample: int = 1
    channel_axis: int | None = None
    channels: tuple[int, int] | None = None
    weight: float = 1.0

    def __str__(self) -> str:
        block = "" if self.channels is None else f"channels {self.channels[0]} to {self.channels[1] - 1} of "
        place = f"{self.name} " if self.name else ""
        title = "left out" if self.distribution is None else self.distribution.title
        if isinstance(self.distribution, Gaussian) and self.channel_axis is not None:
            title += " by channel"
        if self.channel_axis not in (None, 1) and self.distribution is not None:
            title += f" on axis {self.channel_axis}"
        return f"{block}{place}{self.shape} {title}{f': {self.reason}' if self.reason else ''}"

    def view(self, tensor: Tensor) -> Tensor:
        """Return the part as (samples, channels, *positions), a view of the output's tensor."""
        samples, axis = self.sample_axis, self.channel_axis
        view = tensor.movedim(samples, 0)  # (samples, …)
        if axis is None:
            view, channel = view.unsqueeze(1), 1
        else:
            channel = axis if axis > samples else axis + 1
        if self.per_sample > 1:
            view, channel = view.reshape(-1, self.per_sample, *view.shape[1:]), channel + 1
        view = view.movedim(channel, 1)
        return view if self.channels is None else view[:, slice(*self.channels)]

    def without_fit(self) -> OutputPart:
        """Return the part without what was fitted to numbers: variances and the weight."""
        distribution = Gaussian() if isinstance(self.distribution, Gaussian) else self.distribution
        return replace(self, distribution=distribution, weight=1.0)

    def to_json(self) -> dict[str, Any]:
        """Return the part, without what was fitted to numbers, as plain data."""
        form, scale = getattr(self.distribution, "form", None), getattr(self.distribution, "scale", 1.0)
        record = {
            "name": self.name,
            "shape": list(self.shape),
            "distribution": None if self.distribution is None else self.distribution.name,
            "form": form,
            "scale": scale,
            "reason": self.reason,
            "sample_axis": self.sample_axis,
            "per_sample": self.per_sample,
            "channel_axis": self.channel_axis,
            "channels": None if self.channels is None else list(self.channels),
        }
        defaults = {"form": None, "scale": 1.0, "reason": "", "sample_axis": 0, "per_sample": 1, "channels": None}
        return {key: value for key, value in record.items() if key not in defaults or value != defaults[key]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> OutputPart:
        """Return the part that ``to_json`` described. Raises KeyError, TypeError or ValueError for another record."""
        name = record["distribution"]
        options = {key: record[key] for key in ("form", "scale") if key in record}
        distribution = None if name is None else DISTRIBUTIONS[name](**options)
        channels = record.get("channels")
        return cls(
            name=record["name"],
            shape=tuple(record["shape"]),
            distribution=distribution,
            reason=record.get("reason", ""),
            sample_axis=record.get("sample_axis", 0),
            per_sample=record.get("per_sample", 1),
            channel_axis=record["channel_axis"],
            channels=None if channels is None else (channels[0], channels[1]),
        )


def describe(parts: Sequence[OutputPart]) -> str:
    """Return one line about all parts."""
    return "; ".join(map(str, parts))
