"""What every frontend of the capture ladder takes and gives, and how a model is looked at without touching it."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from fxfact.conv import ConvSite, Skip
from fxfact.errors import CaptureError

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
Frontend = Literal["trace", "modules", "export"]
_ONE_AT_A_TIME = RLock()


class Arguments(NamedTuple):
    """Example inputs that are both positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Captured:
    """A ``model`` (the name of its class) made ready for rewriting: its structure is a private copy, its parameters
    still the model's own memory.

    ``frontend``: 'trace', ``network`` is a graph of the whole model; 'modules', it is the model itself, keeping its own
    Python; 'export', it is the graph of ``program``. ``found`` has every convolution, in the order of the calls.
    ``macs`` is the whole network's for one sample, None without example inputs. ``fold_weights`` and
    ``leaf_modules`` are what was asked for. ``compared``: with the model, on ``example_inputs``. ``refused`` says why higher
    frontends, or those that reach fewer convolutions, were not taken.
    """

    frontend: Frontend
    model: str
    network: nn.Module
    found: tuple[ConvSite | Skip, ...]
    macs: int | None
    samples: int
    program: ExportedProgram | None = None
    fold_weights: bool = False
    leaf_modules: tuple[str, ...] = ()
    compared: bool = False
    example_inputs: ExampleInputs | None = None
    refused: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[ConvSite, ...]:
        """The convolutions that can be rewritten."""
        return tuple(found for found in self.found if isinstance(found, ConvSite))


def arguments_of(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tuple is the former, a mapping the latter, a tensor one argument."""
    if isinstance(example_inputs, Arguments):
        return tuple(example_inputs.args), dict(example_inputs.kwargs)
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def check_arguments(model: nn.Module, example_inputs: ExampleInputs) -> inspect.BoundArguments:
    """The arguments bound to the names of ``model.forward``, defaults included. Raises CaptureError."""
    args, kwargs = arguments_of(example_inputs)
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"example_inputs do not fit {type(model).__name__}.forward: {error}. A tuple is the arguments, a dict the "
            "keyword arguments, a tensor one argument."
        ) from error
    bound.apply_defaults()
    return bound


def samples_of(example_inputs: Any, sites: Sequence[ConvSite] = ()) -> int:
    """How many samples the inputs (tensors, or what records their shapes) have: the first size of the first of them,
    unless a convolution sees no batch.
    """
    batched = all(len(shape) == site.spec.order + 2 for site in sites for shape in site.input_shapes or ())
    sizes = [int(shape[0]) for shape in _shapes(example_inputs) if shape]
    return max(1, sizes[0]) if batched and sizes else 1


def random_like(example_inputs: Any) -> Any:
    """Other inputs of the same shapes: numbers with the same mean and deviation, integers and flags reordered."""
    random_state = torch.Generator().manual_seed(1)

    def draw(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.numel() < 2 or value.layout != torch.strided:
            return value
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=random_state, dtype=torch.float64, device="cpu").to(value.device)
            return (drawn * value.double().std() + value.double().mean()).to(value.dtype)
        order = torch.randperm(value.numel(), generator=random_state, device="cpu").to(value.device)
        return value.flatten()[order].reshape(value.shape)

    return tree_map(draw, example_inputs)


def copy_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``arguments_of`` copies, which a model may write to."""
    return arguments_of(tree_map(_copied, example_inputs))


def run_model(forward: Callable[..., Any], example_inputs: ExampleInputs) -> Any:
    """The output on copies of the inputs, without gradients; whatever is random is drawn alike in every run."""
    args, kwargs = copy_arguments(example_inputs)
    with torch.no_grad(), seeded_rng():
        return forward(*args, **kwargs)


@contextmanager
def seeded_rng(seed: int = 0) -> Iterator[None]:
    """Torch's, NumPy's and Python's own generators at this seed inside, and as they were outside. They are those of all
    threads: one at a time.
    """
    with _ONE_AT_A_TIME:
        states = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                np.random.seed(seed)
                random.seed(seed)
                yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def rng_states() -> tuple[Any, ...]:
    """Where those generators stand."""
    _, keys, place, *_ = cast(tuple[Any, ...], np.random.get_state())
    return torch.get_rng_state().tolist(), keys.tolist(), place, random.getstate()


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    try:
        return copy.deepcopy(value)  # it may hold tensors that forward writes to
    except Exception:
        return value


def _shapes(values: Any) -> Iterator[tuple[int, ...]]:
    """Of every tensor, or what describes one, in containers."""
    if hasattr(values, "shape"):
        yield tuple(values.shape)
    elif isinstance(values, Mapping | list | tuple):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _shapes(value)
