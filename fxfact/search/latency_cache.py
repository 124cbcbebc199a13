"""Times that were measured on this machine, in a file of plain JSON for every kind of machine."""

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
_TELLING = ("model name", "cpu family", "model", "stepping")  # in /proc/cpuinfo: one name has many models


@cache
def _processor() -> str:
    """Which processor it is, as far as the system tells, and the instructions that PyTorch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    named = [told[key] for key in _TELLING if key in told] or [platform.processor()]
    return ", ".join([*named, torch.backends.cpu.get_cpu_capability()])


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What times depend on, but for what is computed: processor or accelerator, threads or choice of kernels,
    version of PyTorch.
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
    """Milliseconds by convolution and by what takes its place, in the folder FXFACT_CACHE, or fxfact in XDG_CACHE_HOME
    or ~/.cache.

    A file that is damaged, or of another machine, is left aside with a warning and written anew.
    """

    def __init__(self, described: Mapping[str, Any]) -> None:
        self._machine = dict(described)
        name = hashlib.sha256(json.dumps(self._machine, sort_keys=True).encode()).hexdigest()[:16]
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.path = Path(os.environ.get("FXFACT_CACHE") or Path(base) / "fxfact") / f"times-{name}.json"
        self.ms = self._read()

    def save(self) -> None:
        """Write the file; where that cannot be, say so and go on."""
        content = {**_FORMAT, "machine": self._machine, "ms": self.ms}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                file.write(json.dumps(content, indent=0).encode())
        except OSError as error:
            warn_caller(f"{self.path}: times cannot be kept there: {error}. Set FXFACT_CACHE.")

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            return self._aside(str(error))
        try:
            found = json.loads(text)
            times = {name: {key: float(ms) for key, ms in own.items()} for name, own in found["ms"].items()}
            described = {key: found[key] for key in (*_FORMAT, "machine")}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return self._aside(f"it is damaged: {error}")
        if described != {**_FORMAT, "machine": self._machine}:
            return self._aside("it is of another machine or version")
        possible = all(0 < ms < float("inf") for own in times.values() for ms in own.values())
        return times if possible else self._aside("it holds no times")

    def _aside(self, why: str) -> dict[str, dict[str, float]]:
        warn_caller(f"{self.path}: times are measured again, for {why}")
        return {}
