"""The outputs of a network for the first samples, and the axis of the samples in each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxfact.calibration.batches import cut_batch, run_batch
from fxfact.calibration.output_parts import OutputPart
from fxfact.capture import ExampleInputs, samples_of
from fxfact.errors import CalibrationError
from fxfact.utils import alias_copy, check_finite_state, named_tensors, to_eval

READING_SAMPLES = 64  # that distributions are read from and fitted to
_MOST_NUMBERS = 2**24  # of one output; large maps are read from fewer samples, so that memory does not grow with them
_FEWEST_SAMPLES = 8


class OutputSamples:
    """The outputs of a network for the first samples.

    Attributes:
        names: the places of the tensors.
        tensors: for each place, the tensors of the batches.
        axes: for each place, the axis of the samples and the number of its entries for each sample; None if no axis
            follows the batch size.
    """

    @torch.no_grad()
    def __init__(self, network: nn.Module, batches: Sequence[ExampleInputs]) -> None:
        network = to_eval(alias_copy(network))  # which may keep state between calls
        self._network = network
        self.tensors: dict[str, list[Tensor]] = {}
        self._sizes: list[int] = []
        count = 0
        for batch in batches:
            size = samples_of(batch)
            part = cut_batch(batch, READING_SAMPLES - count)
            self._add(dict(named_tensors(run_batch(network, part))), samples_of(part))
            count += size
            if count >= READING_SAMPLES:
                break
        self.names = list(self.tensors)
        self._shapes_by_size = {self._sizes[0]: self._shapes(0)}
        self._shapes_by_size |= _shapes_at_other_size(network, batches[0])
        self.axes = {name: self._sample_axis(name) for name in self.names}

    def values(self, part: OutputPart) -> Tensor:
        """Return the part for all samples, as (samples, channels, *positions) in double precision."""
        views = [part.view(tensor) for tensor in self.tensors[part.name]]
        count = max(_FEWEST_SAMPLES, _MOST_NUMBERS // max(1, views[0].shape[1:].numel()))
        return torch.cat([view for view in views if view.shape[1:] == views[0].shape[1:]])[:count].double()

    def why_unreadable(self, name: str) -> str:
        """Return why a tensor has no distribution, or ""."""
        tensor = self.tensors[name][0]
        if not tensor.is_floating_point():
            return str(tensor.dtype).removeprefix("torch.")
        return "" if self.axes[name] else "without an axis that follows the batch size"

    def check_finite(self, name: str) -> None:
        """Raise CalibrationError if a tensor of the output has NaN or Inf."""
        if not all(bool(tensor.isfinite().all()) for tensor in self.tensors[name]):
            check_finite_state(self._network, "the model")
            raise CalibrationError(
                f"the model's output{f' {name!r}' if name else ''} is NaN or Inf on this data, although its weights "
                "are finite. Drop the samples that give NaN or Inf. If all do, convert a model in half precision with "
                ".float(), or mask with a large number instead of infinity."
            )

    def _add(self, found: dict[str, Tensor], size: int) -> None:
        if self._sizes and list(found) != list(self.tensors):
            changed = ", ".join(sorted(set(found) ^ set(self.tensors))) or "their order"
            raise CalibrationError(f"the outputs of the model change from batch to batch: {changed}. Return the same.")
        for name, tensor in found.items():
            before = self.tensors.setdefault(name, [])
            if before and before[0].ndim != tensor.ndim:
                raise CalibrationError(
                    f"output {name!r}: its shape changes from {tuple(before[0].shape)} to {tuple(tensor.shape)} from "
                    f"batch to batch. Leave it out: likelihood={{{name!r}: None}}."
                )
            before.append(tensor)
        self._sizes.append(size)

    def _shapes(self, number: int) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensors[number].shape) for name, tensors in self.tensors.items()}

    def _sample_axis(self, name: str) -> tuple[int, int] | None:
        """Return the axis that follows the batch size, and its entries for each sample."""
        (size, shapes), *others = self._shapes_by_size.items()
        shape = shapes[name]
        for axis, length in enumerate(shape):
            per_sample = max(1, length // size)
            expected = [(other, found.get(name)) for other, found in others]
            if length == per_sample * size and all(
                found is not None and len(found) == len(shape) and found[axis] == per_sample * other
                for other, found in expected
            ):
                return axis, per_sample
        return None


def _shapes_at_other_size(network: nn.Module, batch: ExampleInputs) -> dict[int, dict[str, tuple[int, ...]]]:
    """Return the shapes of the outputs for a batch of another size, if the network accepts one."""
    size = samples_of(batch)
    if size > 2:  # not one sample, whose axis some networks squeeze
        other, count = cut_batch(batch, size - 1), size - 1
    else:
        other, count = tree_map(lambda v: torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim else v, batch), 2 * size
    try:
        found = dict(named_tensors(run_batch(network, other)))
    except CalibrationError:  # a network with a fixed batch size
        return {}
    return {count: {name: tuple(tensor.shape) for name, tensor in found.items()}}
