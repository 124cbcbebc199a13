"""The result of a capture, and helpers that run a model without changing it."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from fxfact.conv import ConvSite, Skip, path_of
from fxfact.errors import CaptureError

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
Frontend = Literal["trace", "modules", "export"]
_RNG_LOCK = RLock()
_REASONS = 3  # that a message has


class Arguments(NamedTuple):
    """Example inputs with both positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Captured:
    """A model that is ready for rewriting.

    The network is a private copy of the model's structure. Its parameters use the model's memory.

    Attributes:
        frontend: how the model was captured. 'trace': ``network`` is a graph of the whole model. 'modules':
            ``network`` is a copy of the model with its own Python code. 'export': ``network`` is the graph of
            ``program``.
        model: the name of the model's class.
        network: the private copy.
        found: every convolution, in the order of the calls, or a Skip that says why it cannot be rewritten.
        macs: the multiply-accumulates of the whole network for one sample. None without example inputs.
        samples: the number of samples in the example inputs.
        program: the exported program, if the model is one.
        fold_weights: whether computed weights were folded into parameters.
        leaf_modules: globs on the paths of modules that were not traced into.
        compared: whether the network was compared with the model on ``example_inputs``.
        example_inputs: the example inputs, if any.
        refused: why other front ends were not used.
        lost_members: public methods and properties of the model's class that the network does not have.
        adapters: for the paths of layers that belong to an adapter, such as LoRA, the names of the adapter and its
            owner.
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
    lost_members: tuple[str, ...] = ()
    adapters: Mapping[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[ConvSite, ...]:
        """The convolutions that can be rewritten."""
        return tuple(found for found in self.found if isinstance(found, ConvSite))

    def check_sites(self) -> None:
        """Raise CaptureError if no convolution can be rewritten, with the first reasons."""
        if self.sites:
            return
        if not self.found:
            raise CaptureError(
                f"{self.model} calls no convolution and no linear layer, so there is nothing to learn from data."
            )
        reasons = [f"{path_of(item)}: {item.reason}" for item in self.found[:_REASONS] if isinstance(item, Skip)]
        more = [f"and {len(self.found) - len(reasons)} more"] if len(self.found) > len(reasons) else []
        others = "".join(f" Not captured by {refused}." for refused in self.refused)
        raise CaptureError(
            f"none of the {len(self.found)} layers of {self.model} can be rewritten, so no data are read. "
            f"{'; '.join([*reasons, *more])}.{others} fxfact.plan without data shows all reasons."
        )


def arguments_of(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments.

    A tuple or list has the positional arguments, a mapping the keyword arguments. A tensor is the only argument.
    """
    if isinstance(example_inputs, Arguments):
        return tuple(example_inputs.args), dict(example_inputs.kwargs)
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def check_arguments(model: nn.Module, example_inputs: ExampleInputs) -> inspect.BoundArguments:
    """Bind the example inputs to the parameters of ``model.forward``, with defaults. Raises CaptureError."""
    args, kwargs = arguments_of(example_inputs)
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"example_inputs do not fit {type(model).__name__}.forward: {error}. Pass a tuple of positional arguments, "
            "a dict of keyword arguments, or a tensor as the only argument."
        ) from error
    bound.apply_defaults()
    return bound


def samples_of(example_inputs: Any, sites: Sequence[ConvSite] = ()) -> int:
    """Return the number of samples in the inputs: the first size of the first tensor.

    Args:
        example_inputs: tensors, or records of their shapes, in containers.
        sites: the convolutions. If one of them is called on a single sample without a batch axis, the result is 1.
    """
    shapes = [(site.spec, shape) for site in sites for shape in site.input_shapes or ()]
    telling = [pair for pair in shapes if pair[0].order] or shapes  # a linear layer may get any number of axes
    batched = all(spec.has_batch(shape) for spec, shape in telling)
    sizes = [int(shape[0]) for shape in _shapes(example_inputs) if shape]
    return max(1, sizes[0]) if batched and sizes else 1


def random_like(example_inputs: Any) -> Any:
    """Return random inputs of the same shapes.

    Floating-point tensors get normal numbers with the same mean and standard deviation. Other tensors are shuffled.
    """
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
    """Return positional and keyword arguments that are copies, so that a model may write to them."""
    return arguments_of(tree_map(_copy_value, example_inputs))


def run_model(forward: Callable[..., Any], example_inputs: ExampleInputs) -> Any:
    """Return the output on copies of the inputs, without gradients. Every run uses the same random numbers."""
    args, kwargs = copy_arguments(example_inputs)
    with torch.no_grad(), seeded_rng():
        return forward(*args, **kwargs)


@contextmanager
def seeded_rng(seed: int = 0) -> Iterator[None]:
    """Seed the global generators of PyTorch, NumPy and Python, and restore their states at exit.

    All threads share these generators, so only one thread at a time is inside.
    """
    with _RNG_LOCK:
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
    """Return the states of the three global generators, to compare them."""
    _, keys, position, *_ = cast(tuple[Any, ...], np.random.get_state())
    return torch.get_rng_state().tolist(), keys.tolist(), position, random.getstate()


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    text = str(error.__cause__ or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _copy_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    try:
        return copy.deepcopy(value)  # an object may hold tensors that forward writes to
    except Exception:
        return value


def _shapes(values: Any) -> Iterator[tuple[int, ...]]:
    """Iterate over the shapes of all tensors, or records of tensors, in containers."""
    if hasattr(values, "shape"):
        yield tuple(values.shape)
    elif isinstance(values, Mapping | list | tuple):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _shapes(value)
