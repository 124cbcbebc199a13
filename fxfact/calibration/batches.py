"""Turns the batches that a caller passes into arguments of a model."""

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
    """Yield each batch as arguments of the model, on the model's device.

    What the model does not take, such as labels, is dropped: a tuple is cut to the length of ``example_inputs`` (or to
    the number of arguments that ``forward()`` requires), and a mapping to the names that ``forward()`` knows.

    Args:
        network: The model.
        batches: Tensors, tuples or mappings.
        example_inputs: Arguments of the model, which say how many it takes. None: read the signature of ``forward()``.
        name: The name of the caller's argument, for error messages.

    Raises:
        CalibrationError: An item is no batch, is empty, or contains NaN or Inf; there are no batches; or the loader
            raised.
    """
    _check_iterable(batches, name)
    tensors = [*network.parameters(), *network.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta":
        raise CalibrationError(f"{name}: the model is on the meta device, which computes nothing. Load its weights.")
    count = -1
    for count, batch in enumerate(_iter_loader(batches, name)):
        inputs = _model_inputs(network, batch, example_inputs, name)
        found = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if found and found[0].ndim and not len(found[0]):
            raise CalibrationError(f"{name}: batch {count} contains no samples. Drop it.")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in found if tensor.is_floating_point()):
            raise CalibrationError(f"{name}: batch {count} contains NaN or Inf. Fix it or drop it.")
        yield tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, inputs)
    if count < 0:
        raise CalibrationError(f"{name}: there are no batches. Pass a few hundred samples.")


def first_sample(network: nn.Module, batches: Batches) -> tuple[ExampleInputs, Batches]:
    """Return the first sample as arguments of the model, and an iterable of all batches, the first one included.

    Use the returned iterable instead of ``batches``, because some loaders can be iterated only once.
    Raises CalibrationError.
    """
    _check_iterable(batches, "calibration")
    iterator = iter(batches)
    first_batches = list(islice(_iter_loader(iterator, "calibration"), 1))
    first = next(iter_batches(network, first_batches, None))
    sample = tree_map(lambda value: value[:1] if isinstance(value, Tensor) and value.ndim else value, first)
    return sample, chain(first_batches, iterator)


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
            "that the model accepts."
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


def _check_iterable(batches: object, name: str) -> None:
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise CalibrationError(
            f"{name} must be an iterable of batches, got {type(batches).__name__}. Pass a DataLoader, or a list: "
            "x.split(128)."
        )


def _iter_loader(batches: Batches, name: str) -> Iterator[ExampleInputs]:
    """Yield the batches. An exception of the loader becomes a CalibrationError that says after how many batches."""
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


def _model_inputs(network: nn.Module, batch: Any, example_inputs: ExampleInputs | None, name: str) -> ExampleInputs:
    """Drop the parts of a batch that the model does not take."""
    if isinstance(batch, Mapping):
        parameters = inspect.signature(network.forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        known: Iterable[str] = batch if takes_any else parameters
        known = example_inputs if isinstance(example_inputs, Mapping) else known
        return {key: value for key, value in batch.items() if key in known}
    if isinstance(batch, tuple | list):
        return tuple(batch)[: _argument_count(network, example_inputs)]
    if not isinstance(batch, Tensor):
        raise CalibrationError(f"{name}: a batch must be a tensor, a tuple or a mapping, got {type(batch).__name__}")
    return batch


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
