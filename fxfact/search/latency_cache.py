"""The cache of times that were measured on this machine: one JSON file for each kind of machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fxfact.utils import atomic_write, warn_caller

_FORMAT = {"format": "fxfact times", "version": 2}
_CPU_FIELDS = ("model name", "cpu family", "model", "stepping")  # of /proc/cpuinfo; one name has many models


@cache
def _processor() -> str:
    """Return the name of the processor, as far as the system knows it, and the instruction set that PyTorch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    names = [fields[key] for key in _CPU_FIELDS if key in fields] or [platform.processor()]
    return ", ".join([*names, torch.backends.cpu.get_cpu_capability()])


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what times depend on besides the computation.

    That is the processor or accelerator, the number of threads or the choice of kernels, and the version of PyTorch.
    """
    always = {"kind": device.type, "machine": platform.machine(), "torch": torch.__version__}
    if device.type == "cpu":
        return {**always, "device": _processor(), "threads": torch.get_num_threads()}
    chosen: Any = torch.backends.cudnn
    precision = [chosen.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision]
    kernels = [chosen.version(), chosen.benchmark, chosen.deterministic, *precision]
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    return {**always, "device": name, "kernels": kernels}


class LatencyCache:
    """Milliseconds by layer and by layout, kept in a file.

    The file is in the folder ``$FXFACT_CACHE``, or in ``fxfact`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. A file that is
    damaged, or that was written on another machine, is ignored with a warning and replaced.

    Args:
        machine: what ``describe_machine`` returned.
    """

    def __init__(self, machine: Mapping[str, Any]) -> None:
        self._machine = dict(machine)
        name = hashlib.sha256(json.dumps(self._machine, sort_keys=True).encode()).hexdigest()[:16]
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.path = Path(os.environ.get("FXFACT_CACHE") or Path(base) / "fxfact") / f"times-{name}.json"
        self._times = self._read()

    def times_of(self, layer: str) -> dict[str, float]:
        """Return the times of a layer by layout, in milliseconds. Times added to the dict are kept."""
        return self._times.setdefault(layer, {})

    def clear(self) -> None:
        """Forget all times."""
        self._times.clear()

    def save(self) -> None:
        """Write the file, or warn if it cannot be written."""
        content = {**_FORMAT, "machine": self._machine, "ms": self._times}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                file.write(json.dumps(content, indent=0).encode())
        except OSError as error:
            warn_caller(f"{self.path}: the times cannot be written there: {error}. Set FXFACT_CACHE.")

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            return self._ignore(str(error))
        try:
            found = json.loads(text)
            times = {name: {key: float(ms) for key, ms in own.items()} for name, own in found["ms"].items()}
            described = {key: found[key] for key in (*_FORMAT, "machine")}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return self._ignore(f"it is damaged: {error}")
        if described != {**_FORMAT, "machine": self._machine}:
            return self._ignore("it was written on another machine or by another version")
        possible = all(0 < ms < float("inf") for own in times.values() for ms in own.values())
        return times if possible else self._ignore("it holds no times")

    def _ignore(self, why: str) -> dict[str, dict[str, float]]:
        warn_caller(f"{self.path}: times are measured again, because {why}")
        return {}
