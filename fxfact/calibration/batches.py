"""Turns the batches that a caller passes into arguments of a model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxfact.capture import Arguments, ExampleInputs, copy_arguments, reason_of, samples_of, seeded_rng
from fxfact.errors import CalibrationError

Batches = Iterable[ExampleInputs]
Transform = Callable[[Any], ExampleInputs]


@final
@dataclass(frozen=True, eq=False)
class BatchReader:
    """Batches and what the caller says about them. Iterating yields the transformed batches.

    Attributes:
        batches: What the caller passed.
        name: The name of the caller's argument, for error messages.
        transform: Makes of a batch what the model is called with.
        max_samples: How many samples ``iter_batches`` yields at most.
        has_transform: Whether the batches are, or were, transformed.
        length: The number of batches. None: ask ``batches``.
    """

    batches: Batches
    name: str = "calibration"
    transform: Transform | None = None
    max_samples: int | None = None
    has_transform: bool = False
    length: int | None = None

    @classmethod
    def of(cls, batches: Batches) -> BatchReader:
        """Return a reader of the batches, which may be a reader already."""
        return batches if isinstance(batches, BatchReader) else cls(batches)

    def __iter__(self) -> Iterator[ExampleInputs]:
        """Yield the transformed batches. Raises CalibrationError if the loader or the transform raises."""
        if isinstance(self.batches, Tensor | Mapping | str) or not isinstance(self.batches, Iterable):
            raise CalibrationError(
                f"{self.name} must be an iterable of batches, got {type(self.batches).__name__}. Pass a DataLoader, or "
                "a list: x.split(128)."
            )
        iterator, count = iter(self.batches), 0
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except CalibrationError:  # of a reader inside
                raise
            except Exception as error:
                raise CalibrationError(f"{self.name}: the loader raised after {count} batches: {error!r}") from error
            if self.transform is not None:
                try:
                    batch = self.transform(batch)
                except Exception as error:
                    raise CalibrationError(f"{self.name}: transform raised on batch {count}: {error!r}") from error
            yield batch
            count += 1

    def count_batches(self, first: ExampleInputs) -> int | None:
        """Return how many batches there will probably be, or None. ``first`` is the first one, cut to the limit."""
        length = self.length
        if length is None:
            try:
                length = len(self.batches)  # type: ignore[arg-type]
            except Exception:  # a loader of an iterable data set has __len__, and raises
                length = None
        if self.max_samples is None:
            return length
        limit = math.ceil(self.max_samples / max(_sample_count(first), 1))
        return limit if length is None else min(limit, length)


def iter_batches(network: nn.Module, batches: Batches, example_inputs: ExampleInputs | None) -> Iterator[ExampleInputs]:
    """Yield each batch as arguments of the model, on the model's device, up to the limit on samples.

    What the model does not take, such as labels, is dropped: a tuple is cut to the length of ``example_inputs`` (or to
    the number of arguments that ``forward()`` requires, unless the caller's transform made the tuple), and a mapping to
    the names that ``forward()`` knows.

    Args:
        network: The model.
        batches: Tensors, tuples or mappings; or a BatchReader of them.
        example_inputs: Arguments of the model, which say how many it takes. None: read the signature of ``forward()``.

    Raises:
        CalibrationError: An item is no batch, is empty, or contains NaN or Inf; there are no batches; or the loader
            raised.
    """
    reader = BatchReader.of(batches)
    tensors = [*network.parameters(), *network.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta":
        raise CalibrationError(
            f"{reader.name}: the model is on the meta device, which computes nothing. Load its weights."
        )
    count, left = -1, reader.max_samples
    for count, batch in enumerate(reader):
        place = f"{reader.name}: batch {count}"
        inputs = _model_inputs(network, batch, example_inputs, place, has_transform=reader.has_transform)
        samples = _sample_count(inputs)
        if not samples:
            raise CalibrationError(f"{place} contains no samples. Drop it.")
        if left is not None and samples > left:
            inputs = cut_batch(inputs, left)
        found = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in found if tensor.is_floating_point()):
            raise CalibrationError(f"{place} contains NaN or Inf. Fix it or drop it.")
        yield tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, inputs)
        left = None if left is None else left - samples
        if left is not None and left <= 0:
            return  # without asking for one more batch, which an endless loader would have to wait for
    if count < 0:
        raise CalibrationError(f"{reader.name}: there are no batches. Pass a few hundred samples.")


def first_batch(network: nn.Module, batches: Batches) -> tuple[ExampleInputs, BatchReader]:
    """Return the first batch as arguments of the model, and all batches, the first one included.

    Use the returned batches instead of ``batches``, because some loaders can be iterated only once.
    Raises CalibrationError.
    """
    reader = BatchReader.of(batches)
    iterator = iter(reader)
    first_batches = list(islice(iterator, 1))
    first = next(iter_batches(network, replace(reader, batches=first_batches, transform=None), None))
    rest = replace(reader, batches=chain(first_batches, iterator), transform=None, length=reader.count_batches(first))
    return first, rest


def peek_batches(batches: Iterator[ExampleInputs], samples: int) -> tuple[list[ExampleInputs], Iterator[ExampleInputs]]:
    """Return the first batches, with at least so many samples if there are so many, and an iterator over all."""
    first: list[ExampleInputs] = []
    count = 0
    while count < samples:
        try:
            first.append(next(batches))
        except StopIteration:
            break
        count += samples_of(first[-1])
    return list(first), chain(_consume(first), batches)


def _consume(batches: list[ExampleInputs]) -> Iterator[ExampleInputs]:
    """Yield the batches, and forget each of them."""
    while batches:
        yield batches.pop(0)


def run_batch(network: nn.Module, batch: ExampleInputs) -> Any:
    """Return the network's output for a batch. Raises CalibrationError if the network fails."""
    with batch_call(network, batch) as (args, kwargs):
        return network(*args, **kwargs)


@contextmanager
def batch_call(network: nn.Module, batch: ExampleInputs) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield a copy of a batch as arguments for the network, to be called inside the block.

    Inside the block, PyTorch's random numbers start from the same seed every time, so that networks can be compared.
    Every exception is raised again as a CalibrationError.
    """
    try:
        with seeded_rng():
            yield copy_arguments(batch)
    except Exception as error:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        raise CalibrationError(
            f"{type(network).__name__} fails on a batch of {shapes or 'no tensors'}: {reason_of(error)}. Pass batches "
            "that the model accepts. In Python, transform= can convert yours."
        ) from error


def split_held_out(batches: Sequence[ExampleInputs]) -> tuple[list[ExampleInputs], list[ExampleInputs]]:
    """Split batches into those to learn from and those held out for measuring.

    Every fourth batch is held out; of two or three batches, the last. Raises CalibrationError for a single batch.
    """
    if len(batches) < 2:
        raise CalibrationError(
            "every fourth batch is held out for measuring, so at least two batches are needed, got 1. Pass smaller "
            "batches."
        )
    held_out = set(range(3, len(batches), 4)) or {len(batches) - 1}
    return [b for k, b in enumerate(batches) if k not in held_out], [b for k, b in enumerate(batches) if k in held_out]


def take_samples(batches: Iterable[ExampleInputs], max_samples: int) -> Iterator[ExampleInputs]:
    """Yield batches until they have ``max_samples`` samples together. The last one is cut."""
    for batch in batches:
        yield cut_batch(batch, max_samples)
        max_samples -= _sample_count(batch)
        if max_samples <= 0:
            return


def _sample_count(inputs: ExampleInputs) -> int:
    """Return the first size of the first tensor that has axes; 1 if there is none."""
    return next((len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def cut_batch(inputs: ExampleInputs, count: int) -> ExampleInputs:
    """Return the first samples of a batch. Tensors whose first axis has another size than the first one's stay."""
    samples = _sample_count(inputs)
    cut: ExampleInputs = tree_map(
        lambda value: value[:count] if isinstance(value, Tensor) and value.shape[:1] == (samples,) else value, inputs
    )
    return cut


def _model_inputs(
    network: nn.Module, batch: Any, example_inputs: ExampleInputs | None, place: str, *, has_transform: bool
) -> ExampleInputs:
    """Drop the parts of a batch that the model does not take. Raises CalibrationError."""
    if isinstance(batch, Mapping):
        return _keyword_inputs(network, batch, example_inputs, place)
    if isinstance(batch, tuple | list):
        is_complete = has_transform and example_inputs is None
        return tuple(batch) if is_complete else tuple(batch)[: _argument_count(network, example_inputs)]
    if not isinstance(batch, Tensor):
        found = type(batch).__name__
        if has_transform:
            raise CalibrationError(f"{place}: transform must return a tensor, a tuple or a mapping, got {found}")
        raise CalibrationError(
            f"{place}: a batch must be a tensor, a tuple or a mapping, got {found}. Pass transform=, a function that "
            "makes one of these of it."
        )
    return batch


def _keyword_inputs(
    network: nn.Module, batch: Mapping[Any, Any], example_inputs: ExampleInputs | None, place: str
) -> ExampleInputs:
    """Drop the entries that ``forward()`` does not name. Raises CalibrationError if it needs others."""
    parameters = inspect.signature(network.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known: Iterable[Any] = batch if takes_any else [p.name for p in named]
    known = example_inputs if isinstance(example_inputs, Mapping) else known
    inputs = {key: batch[key] for key in known if key in batch}  # the first tensor of forward() counts samples
    missing = [p.name for p in named if p.default is p.empty and p.name not in batch]
    if missing or not inputs:
        names = [p.name for p in named] or [*known, "x"]
        unused = [repr(key) for key, value in batch.items() if key not in inputs and isinstance(value, Tensor)]
        example = f"{{**batch, {(missing or names)[0]!r}: batch[{(unused or ['...'])[0]}]}}"
        raise CalibrationError(
            f"{place} has the keys {_format_names(batch)}, and {type(network).__name__}.forward() takes "
            f"{_format_names(names)}. Pass transform=, a function that renames them: transform=lambda batch: {example}"
        )
    return inputs


def _format_names(names: Iterable[Any]) -> str:
    listed = list(map(str, names))
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "") or "none"


def _argument_count(network: nn.Module, example_inputs: ExampleInputs | None) -> int | None:
    """Return how many positional arguments the model takes; None for any number."""
    if isinstance(example_inputs, Arguments):
        return len(example_inputs.args)
    if isinstance(example_inputs, tuple | list):
        return len(example_inputs)
    if example_inputs is not None:
        return 1
    parameters = inspect.signature(network.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return max(1, len(required))
