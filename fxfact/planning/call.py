"""The call that made a plan, and the versions that it ran with, as plain data."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sized
from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from fxfact.calibration import Statistics

_WITHOUT_EFFECT = {"model", "error_curves", "executor", "progress"}  # on the plan
_BATCHES = {"calibration", "held_out"}


def installed_versions() -> dict[str, str]:
    """Return the versions of fxfact and PyTorch. That of fxfact is unknown if it is not installed."""
    try:
        own = version("fxfact")
    except PackageNotFoundError:
        own = "unknown"
    return {"fxfact": own, "torch": str(torch.__version__)}


def describe_call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call that are not the defaults, as plain data that people can read.

    Args:
        function: the function, whose parameters say which arguments count.
        arguments: all arguments by name. Others are left out.

    Returns:
        Numbers, strings, lists and dicts. Objects become their class with their fields, tensors their dtype and shape,
        batches their class and number, functions their names.
    """
    call = {}
    for name, parameter in inspect.signature(function).parameters.items():
        value = arguments[name]
        if name not in _WITHOUT_EFFECT and value is not parameter.default:
            call[name] = _described_batches(value) if name in _BATCHES else _described(value)
    return call


def format_call(call: Mapping[str, Any]) -> str:
    """Return the call of ``fxfact.plan`` that ``describe_call`` described, as Python that people can read."""
    arguments = [f"{name}={_format_described(value)}" for name, value in call.items()]
    return f"fxfact.plan({', '.join(['model', *arguments])})"


def _format_described(value: Any) -> str:
    """Return plain data as Python. A mapping from one name to a mapping was an object."""
    if isinstance(value, list):
        return f"[{', '.join(map(_format_described, value))}]"
    if not isinstance(value, Mapping):
        return repr(value)
    if len(value) == 1 and isinstance(fields := next(iter(value.values())), Mapping):
        return f"{next(iter(value))}({', '.join(f'{name}={_format_described(v)}' for name, v in fields.items())})"
    return f"{{{', '.join(f'{name!r}: {_format_described(v)}' for name, v in value.items())}}}"


def _described(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_described(item) for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    return _described_object(value)


def _described_object(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__: _described_fields(value)}
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else type(value).__name__


def _described_fields(record: Any) -> dict[str, Any]:
    """Return the fields that a record prints and that are not the defaults."""
    found = {}
    for field in fields(record):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(record, field.name)
        if field.repr and (default is MISSING or (value is not default and value != default)):
            found[field.name] = _described(value)
    return found


def _described_batches(value: Any) -> Any:
    if isinstance(value, Statistics):
        digest = hashlib.sha256("".join(map(value.digest, value.specs)).encode()).hexdigest()[:16]
        return {"Statistics": {"samples": value.samples, "likelihood": value.likelihood, "digest": digest}}
    try:
        count = len(value) if isinstance(value, Sized) else None
    except TypeError:  # a loader of an iterable data set
        count = None
    return {type(value).__name__: {} if count is None else {"batches": count}}
