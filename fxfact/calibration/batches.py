"""A caller's batches, one by one, as the arguments of a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxfact.capture import Arguments, ExampleInputs, copy_arguments, reason_of, seeded_rng
from fxfact.errors import CalibrationError

Batches = Iterable[ExampleInputs]


def iter_batches(
    network: nn.Module, batches: Batches, example_inputs: ExampleInputs | None, *, name: str = "calibration"
) -> Iterator[ExampleInputs]:
    """Every batch without what the model does not take, such as labels, on the device of the model.

    A tuple is cut to the length of ``example_inputs``, or to the arguments that forward needs, a mapping to the names
    known. ``name`` is what the caller calls the batches. Raises CalibrationError: for what is no batch, NaN and Inf, a
    batch or a loader without samples, and where the loader raises.
    """
    _check(batches, name)
    tensors = [*network.parameters(), *network.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta":
        raise CalibrationError(f"{name}: the model is on the meta device, where it computes nothing. Load its weights.")
    count = -1
    for count, batch in enumerate(_raising(batches, name)):
        cut = _cut(network, batch, example_inputs, name)
        given = [leaf for leaf in tree_leaves(cut) if isinstance(leaf, Tensor)]
        if given and given[0].ndim and not len(given[0]):
            raise CalibrationError(f"{name}: batch {count} holds no samples. Drop it.")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in given if tensor.is_floating_point()):
            raise CalibrationError(f"{name}: batch {count} holds NaN or Inf. Repair or drop it.")
        yield tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, cut)
    if count < 0:
        raise CalibrationError(f"{name}: there is no batch. Pass some hundred samples.")


def first_sample(network: nn.Module, batches: Batches) -> tuple[ExampleInputs, Batches]:
    """The first sample of the first batch, as the arguments of the model, and all of the batches, once: some loaders
    begin but once. Raises CalibrationError.
    """
    _check(batches, "calibration")
    coming = iter(batches)
    looked_at = list(islice(_raising(coming, "calibration"), 1))
    first = next(iter_batches(network, looked_at, None))
    sample = tree_map(lambda value: value[:1] if isinstance(value, Tensor) and value.ndim else value, first)
    return sample, chain(looked_at, coming)


def run_batch(network: nn.Module, batch: ExampleInputs) -> Any:
    """The network's output for a batch. Raises CalibrationError where the network fails."""
    with batch_call(network, batch) as (args, kwargs):
        return network(*args, **kwargs)


@contextmanager
def batch_call(network: nn.Module, batch: ExampleInputs) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments for the network, copies of those of a batch; whatever is random inside is drawn alike in every run, so
    that networks can be compared. Raises CalibrationError for what fails inside.
    """
    try:
        with seeded_rng():
            yield copy_arguments(batch)
    except Exception as error:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        raise CalibrationError(
            f"{type(network).__name__} fails on a batch of {shapes or 'no tensors'}: {reason_of(error)}. Give batches "
            "that the model takes."
        ) from error


def split_held_out(batches: Sequence[ExampleInputs]) -> tuple[list[ExampleInputs], list[ExampleInputs]]:
    """The batches to learn from, and those held out to measure on: every fourth, the last of two or three.

    Raises CalibrationError for a single one.
    """
    if len(batches) < 2:
        raise CalibrationError(
            "every fourth batch is held out to measure on, so there must be two at least, got 1. Pass smaller ones."
        )
    out = set(range(3, len(batches), 4)) or {len(batches) - 1}
    return [b for k, b in enumerate(batches) if k not in out], [b for k, b in enumerate(batches) if k in out]


def _check(batches: object, name: str) -> None:
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"{name} must be an iterable of batches, got {type(batches).__name__}. Pass a DataLoader, or a list: "
            "x.split(128)."
        )


def _raising(batches: Batches, name: str) -> Iterator[ExampleInputs]:
    iterator, count = iter(batches), 0
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise CalibrationError(f"{name}: the loader raised after {count} batches: {error!r}") from error
        yield batch
        count += 1


def _cut(network: nn.Module, batch: Any, example_inputs: ExampleInputs | None, name: str) -> ExampleInputs:
    if isinstance(batch, Mapping):
        parameters = inspect.signature(network.forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        known: Iterable[str] = batch if takes_any else parameters
        known = example_inputs if isinstance(example_inputs, Mapping) else known
        return {key: value for key, value in batch.items() if key in known}
    if isinstance(batch, tuple | list):
        return tuple(batch)[: _length(network, example_inputs)]
    if not isinstance(batch, Tensor):
        raise CalibrationError(f"{name}: a batch is a tensor, a tuple or a mapping, got {type(batch).__name__}")
    return batch


def _length(network: nn.Module, example_inputs: ExampleInputs | None) -> int | None:
    """Of the arguments, None for all of them."""
    if isinstance(example_inputs, Arguments):
        return len(example_inputs.args)
    if isinstance(example_inputs, tuple | list):
        return len(example_inputs)
    if example_inputs is not None:
        return 1
    parameters = inspect.signature(network.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return max(1, len(needed))
