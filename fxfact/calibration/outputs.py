"""Reads what the outputs of a network mean from their values: which distribution each one has, along which axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist

import torch
from torch import Tensor, nn

from fxfact.calibration.distributions import Bernoulli, Categorical, Gaussian
from fxfact.calibration.output_parts import DISTRIBUTIONS, OutputPart, describe
from fxfact.calibration.output_samples import OutputSamples
from fxfact.capture import ExampleInputs
from fxfact.errors import CalibrationError

_NAMES = ", ".join(map(repr, DISTRIBUTIONS))
_SUM_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of probabilities that sum to 1
_HALF_SUM_TOLERANCE = 3e-2
_CONSTANT = 1e-6  # relative difference between samples
_CERTAIN = 0.35  # mean of 4 p (1 − p) below which numbers in [0, 1] are probabilities
_BLOCK_VALUES = 64  # of each channel, without which a block of channels may be in [0, 1] by chance
_CONFIDENT = 1 / 3  # softmax of the winner from which on numbers are logits: 0 is chance, 1 is certain
_STANDOUT = 1.5  # distance of the winner from the second, in units of that of normally distributed numbers
_FREE_WINNERS = 0.3  # share of the winners' entropy that must be left where the position is known
_FEWEST_NEIGHBOURS = 6  # along an axis that can be told to be one of space or time
_SMOOTH = 0.5  # correlation of neighbours, beyond that of distant ones
_LEAST_INFORMATION = 1e-3  # nats per sample below which a prediction counts as constant
_INTERMEDIATE = ("hidden_state", "past_key_value", "cache", "attentions", "loss")  # in names, beside logits


def read_outputs(
    network: nn.Module, batches: Sequence[ExampleInputs], request: object = None
) -> tuple[OutputPart, ...]:
    """Read and fit the distributions of a network's outputs.

    Every floating-point tensor is a part of its own. The axis of the samples is the one that follows the batch size.
    Then the values decide, in this order: numbers that are equal for all samples are left out; an axis along which
    numbers in [0, 1] sum to 1 holds probabilities, and one along which exponentials sum to 1 log-probabilities; other
    numbers in [0, 1], mostly near 0 or 1, are independent probabilities; an axis with one clear winner, not the same
    for all samples, holds logits; and all else are numbers.

    Args:
        network: the network, in evaluation mode.
        batches: the first batches, with at least ``READING_SAMPLES`` samples if there are so many.
        request: what the caller says about the outputs: the name of a distribution for all of them, a mapping from
            their names, a sequence in their order (both with None for an output that is left out), or parts that were
            read before.

    Returns:
        The parts, fitted to the outputs.

    Raises:
        CalibrationError: an output is NaN or Inf or changes its shape, the request does not fit the outputs, or no
            output is left.
    """
    outputs = OutputSamples(network, batches)
    if isinstance(request, tuple) and all(isinstance(part, OutputPart) for part in request):
        parts = [_known_part(part, outputs) for part in request]
    else:
        names = _requested_names(request, outputs)
        parts = [part for name in outputs.names for part in _read_tensor(name, outputs, names)]
        if all(part.distribution is None for part in parts):  # then samples that are all equal are no evidence
            parts = [part for name in outputs.names for part in _read_tensor(name, outputs, names, constant=True)]
    if all(part.distribution is None for part in parts):
        raise CalibrationError(
            f"the model's output has nothing that an error could be measured by: {describe(parts) or 'no tensors'}. "
            f"{_way_out(outputs)}"
        )
    return tuple(_fitted(parts, outputs))


def _way_out(outputs: OutputSamples) -> str:
    """Say what a model could return instead of outputs that are all left out."""
    tensors = [tensors[0] for tensors in outputs.tensors.values()]
    if any(tensor.is_floating_point() and tensor.ndim for tensor in tensors):
        return "Return numbers that depend on the input, with the samples on the first axis."
    if any(tensor.is_floating_point() for tensor in tensors):
        return "Return one value for each sample (n,) instead of their sum or mean."
    if any(tensor.is_complex() for tensor in tensors):
        return "Return the real and imaginary parts: torch.view_as_real(output)."
    return "Return the numbers that they are computed from: the logits instead of their argmax, for example."


def _requested_names(request: object, outputs: OutputSamples) -> dict[str, str | None]:
    """Return the distributions that a caller named, by output. None leaves an output out.

    Raises CalibrationError.
    """
    if request is None:
        return {}
    if isinstance(request, str):
        name = _checked_name(request, "likelihood")
        return {place: name for place in outputs.names if not outputs.why_unreadable(place)}
    if isinstance(request, Mapping):
        pairs = [(str(key), value) for key, value in request.items()]
    else:
        assert isinstance(request, Sequence)
        tops = list(dict.fromkeys(name.partition(".")[0] for name in outputs.names))
        if len(tops) != len(request):
            raise CalibrationError(
                f"likelihood has {len(request)} entries, but the model returns {len(tops)} outputs: {', '.join(tops)}. "
                "Pass one for each, None to leave it out."
            )
        pairs = list(zip(tops, request, strict=True))
    names: dict[str, str | None] = {}
    for key, value in pairs:
        matching = [name for name in outputs.names if name == key or name.startswith(f"{key}.")]
        if not matching:
            known = ", ".join(map(repr, outputs.names))
            raise CalibrationError(f"likelihood: there is no output {key!r}. The model returns {known}.")
        for name in matching:
            names[name] = None if value is None else _checked_name(value, f"likelihood[{key!r}]")
            if value is not None and (obstacle := outputs.why_unreadable(name)):
                raise CalibrationError(
                    f"likelihood: the output {name!r} cannot be {value!r}, because it is {obstacle}. Pass None for it."
                )
    return names


def _checked_name(name: object, place: str) -> str:
    if name not in DISTRIBUTIONS:
        raise CalibrationError(f"{place} cannot be {name!r}. Pass {_NAMES}, or None to leave an output out.")
    return str(name)


def _read_tensor(
    name: str, outputs: OutputSamples, requested: Mapping[str, str | None], *, constant: bool = False
) -> list[OutputPart]:
    """Return the parts of one tensor of the output. ``constant``: also if it is equal for all samples."""
    first = outputs.tensors[name][0]
    part = OutputPart(name=name, shape=tuple(first.shape))
    if obstacle := outputs.why_unreadable(name):
        return [replace(part, reason=obstacle)]
    if name in requested and requested[name] is None:
        return [replace(part, reason="as requested")]
    if name not in requested and _is_intermediate(name, outputs.names):
        return [replace(part, reason="an intermediate result by its name")]
    outputs.check_finite(name)
    axis, per_sample = outputs.axes[name] or (0, 1)
    part = replace(part, sample_axis=axis, per_sample=per_sample)
    asked = requested.get(name)
    if asked is not None:
        return [_read_as(asked, part, outputs)]
    values = outputs.values(part)
    if (
        not constant
        and len(values) > 1
        and float((values - values[:1]).abs().max()) <= _CONSTANT * float(values.abs().max())
    ):
        return [replace(part, reason="equal for all samples")]
    return _read_blocks(part, outputs) or [_read_values(part, outputs)]


def _is_intermediate(name: str, names: Sequence[str]) -> bool:
    """Return whether a name is one that model libraries give to intermediate results beside logits."""
    has_logits = any(other.endswith("logits") for other in names)
    return has_logits and any(word in name for word in _INTERMEDIATE)


def _axes_of(part: OutputPart, outputs: OutputSamples) -> list[int]:
    """Return the axes that classes or channels may be on: first axis 1, then the last axis, then the others."""
    shape = outputs.tensors[part.name][0].shape
    axes = [axis for axis in range(len(shape)) if axis != part.sample_axis]
    return sorted(axes, key=lambda axis: (axis != axes[0], axis != axes[-1], axis))


def _read_values(part: OutputPart, outputs: OutputSamples) -> OutputPart:
    """Return a part with the distribution that its values show."""
    axes = [part.channel_axis] if part.channels else _axes_of(part, outputs)
    views: dict[int | None, OutputPart] = {axis: replace(part, channel_axis=axis) for axis in axes}
    classes = {axis: view for axis, view in views.items() if outputs.values(view).shape[1] > 1}
    for view in classes.values():
        if form := _normalized_form(outputs.values(view), outputs.tensors[part.name][0].dtype):
            return replace(view, distribution=Categorical(form))
    values = outputs.values(part)
    if _are_probabilities(values):
        return replace(part, channel_axis=_channel_axis(views, outputs), distribution=Bernoulli())
    for axis, view in classes.items():
        if axis in axes[:2] and _are_logits(outputs.values(view)):
            return replace(view, distribution=Categorical("logits"))
    return replace(part, channel_axis=_channel_axis(views, outputs), distribution=Gaussian())


def _read_blocks(part: OutputPart, outputs: OutputSamples) -> list[OutputPart]:
    """Return the parts of a tensor that has probabilities in one block of its channels and other numbers beside them.

    Detectors concatenate boxes and scores in this way. The list is empty if there are no such blocks.
    """
    for axis in _axes_of(part, outputs)[:2]:
        view = replace(part, channel_axis=axis)
        values = outputs.values(view)
        flat = values.transpose(0, 1).flatten(1)
        if flat.shape[1] < _BLOCK_VALUES or _is_smooth(values):
            continue
        within = ((flat >= 0) & (flat <= 1)).all(1).tolist()
        starts = [k for k in range(len(within)) if k == 0 or within[k] != within[k - 1]]
        if not 2 <= len(starts) <= 3:
            continue
        blocks = [replace(view, channels=block) for block in zip(starts, [*starts[1:], len(within)], strict=True)]
        read = [_read_values(block, outputs) for block in blocks]
        inside = [block for block, start in zip(read, starts, strict=True) if within[start]]
        if all(isinstance(block.distribution, Categorical | Bernoulli) for block in inside):
            return read
    return []


def _normalized_form(values: Tensor, dtype: torch.dtype) -> str:
    """Return 'probabilities' or 'log-probabilities' if the values along axis 1 are normalized, else ""."""
    tolerance = _SUM_TOLERANCE.get(dtype, _HALF_SUM_TOLERANCE)
    if float(values.min()) >= 0 and float((values.sum(1) - 1).abs().max()) <= tolerance:
        return "probabilities"
    if float(values.max()) <= tolerance and float(values.logsumexp(1).abs().max()) <= tolerance:
        return "log-probabilities"
    return ""


def _are_probabilities(values: Tensor) -> bool:
    """Return whether numbers are in [0, 1] and mostly certain. Intensities of pictures are mostly in between."""
    if float(values.min()) < 0 or float(values.max()) > 1:
        return False
    return float((4 * values * (1 - values)).mean()) < _CERTAIN


def _are_logits(values: Tensor) -> bool:
    """Return whether the values along axis 1 have a clear winner, which is not the same for all samples.

    A trained classifier is confident: its softmax gives the winner much more probability than chance, and the winner
    stands out from the second by more than the largest of as many normally distributed numbers would, and more than the
    smallest stands out. Of two classes, one goes up as the other goes down. Numbers in [0, 1] are no logits.
    """
    classes = values.shape[1]
    if (float(values.min()) >= 0 and float(values.max()) <= 1) or _is_smooth(values):
        return False
    winners = nn.functional.one_hot(values.argmax(1), classes).double().reshape(len(values), -1, classes)
    overall = float(torch.special.entr(winners.mean((0, 1))).sum())
    by_position = float(torch.special.entr(winners.mean(0)).sum(1).mean())
    if overall < math.log(1.1) or (len(values) > 1 and by_position < _FREE_WINNERS * overall):
        return False  # coordinates of boxes have winners too, but nearly the same ones for every sample
    values = values.transpose(0, 1).flatten(1).T  # (predictions, classes)
    confidence = float(values.softmax(1).amax(1).mean())
    if (confidence - 1 / classes) / (1 - 1 / classes) < _CONFIDENT:
        return False
    if classes == 2:
        centered = values - values.mean(0)
        return float((centered[:, 0] * centered[:, 1]).mean()) < -0.5 * float(centered.square().mean())
    ordered, spread = values.sort(1).values, values.std(1).clamp_min(1e-300)
    top, bottom = (float(((ordered[:, k + 1] - ordered[:, k]) / spread).mean()) for k in (classes - 2, 0))
    return top > _STANDOUT * max(_expected_gap(classes), bottom)


def _is_smooth(values: Tensor) -> bool:
    """Return whether neighbours along axis 1 are more alike than others, as they are along an axis of space or time."""
    count = values.shape[1]
    if count < _FEWEST_NEIGHBOURS:
        return False
    rows = values.transpose(0, 1).flatten(1)
    rows = nn.functional.normalize(rows - rows.mean(1, keepdim=True), dim=1)
    near, far = ((rows * rows.roll(shift, 0)).sum(1)[shift:].mean() for shift in (1, count // 2))
    return float(near - far) > _SMOOTH


def _expected_gap(count: int) -> float:
    """Return the mean distance between the two largest of ``count`` standard normal numbers (Blom 1958)."""
    largest, second = (NormalDist().inv_cdf((count - k - 0.375) / (count + 0.25)) for k in (0, 1))
    return largest - second


def _channel_axis(views: Mapping[int | None, OutputPart], outputs: OutputSamples) -> int | None:
    """Return the axis along which the means of the numbers differ most, compared with how they spread.

    Axis 1 (the first in ``views``) is preferred unless another has twice as large an F statistic.
    """
    best, most = next(iter(views), None), 0.0
    for axis, view in views.items():
        values = outputs.values(view).transpose(0, 1).flatten(1)
        if len(values) < 2:
            continue
        between = values.mean(1).var() * values.shape[1]
        ratio = float(between / values.var(1).mean().clamp_min(1e-300)) if values.shape[1] > 1 else 0.0
        if ratio > (2 * most if most else 0.0):
            best, most = axis, ratio
    return best


def _read_as(name: str, part: OutputPart, outputs: OutputSamples) -> OutputPart:
    """Return a part with the distribution that the caller named, along the axis that its values show."""
    views: dict[int | None, OutputPart] = {a: replace(part, channel_axis=a) for a in _axes_of(part, outputs)}
    if name == Gaussian.name:
        return replace(part, channel_axis=_channel_axis(views, outputs), distribution=Gaussian())
    if name == Bernoulli.name:
        values = outputs.values(part)
        form = "probabilities" if float(values.min()) >= 0 and float(values.max()) <= 1 else "logits"
        return replace(part, channel_axis=_channel_axis(views, outputs), distribution=Bernoulli(form))
    classes = [view for view in views.values() if outputs.values(view).shape[1] > 1]
    if not classes:
        raise CalibrationError(
            f"likelihood: the output {part.name!r} {part.shape} has no axis of classes, as 'categorical' needs it. "
            "Pass 'bernoulli' for probabilities or logits of independent events, or 'gaussian'."
        )
    dtype = outputs.tensors[part.name][0].dtype
    for view in classes:
        if form := _normalized_form(outputs.values(view), dtype):
            return replace(view, distribution=Categorical(form))
    shown = [view for view in classes if _are_logits(outputs.values(view))]
    return replace((shown or classes)[0], distribution=Categorical("logits"))


def _known_part(part: OutputPart, outputs: OutputSamples) -> OutputPart:
    """Return a part that was read before, if the network has it. Raises CalibrationError if it has not."""
    if part.distribution is None:
        return part
    found = outputs.tensors.get(part.name)
    if found is None or found[0].ndim != len(part.shape):
        raise CalibrationError(
            f"the plan or the statistics describe an output {part}, but the model returns "
            f"{ {name: tuple(tensors[0].shape) for name, tensors in outputs.tensors.items()} }. Pass likelihood= again."
        )
    outputs.check_finite(part.name)
    return part


def _fitted(parts: Sequence[OutputPart], outputs: OutputSamples) -> list[OutputPart]:
    """Fit the distributions to the outputs, and weight them so that none of several drowns the others.

    The divergence of each part is divided by the information that it carries, which is what there is to lose, and
    multiplied by the least information of all parts. A part that is as good as constant is left out.
    """
    fitted, information = [], {}
    for k, part in enumerate(parts):
        if part.distribution is not None:
            values = outputs.values(part)
            distribution = part.distribution.fitted(values)
            information[k] = distribution.information(values)
            fitted.append(replace(part, distribution=distribution, weight=1.0))
        else:
            fitted.append(part)
    alive = {k: amount for k, amount in information.items() if amount >= _LEAST_INFORMATION}
    if len(information) < 2 or not alive:
        return fitted
    least = min(alive.values())
    for k in information:
        if k in alive:
            fitted[k] = replace(fitted[k], weight=least / alive[k])
        else:
            fitted[k] = replace(fitted[k], distribution=None, reason="almost equal for all samples")
    return fitted
