"""What the passes leave behind on a graph module for whoever inspects it later."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn
from torch._logging._internal import trace_structured
from torch.export import ExportedProgram

from fxfact.errors import PlanError
from fxfact.planning import Plan

_KEY = "fxfact"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Applied:
    """A plan that was carried out; ``relative_error`` ‖W − Ŵ‖_F / ‖W‖_F by path, None where weights were left empty."""

    plan: Plan
    relative_error: Mapping[str, float | None]


def applied(network: nn.Module | ExportedProgram) -> tuple[Applied, ...]:
    """Every plan carried out on this network, oldest first; they survive copying and pickling."""
    module = network.graph_module if isinstance(network, ExportedProgram) else network
    meta = module.meta if isinstance(module, fx.GraphModule) and isinstance(module.meta, dict) else {}
    found: tuple[Applied, ...] | None = meta.get(_KEY)
    return found if found is not None else tuple(getattr(module, f"_{_KEY}", ()))


def last_plan(network: nn.Module | ExportedProgram) -> Plan:
    """The plan carried out last on it. Raises PlanError where there is none."""
    history = applied(network)
    if not history:
        raise PlanError(f"{type(network).__name__} was not made by a plan. fxfact.factorize returns one that was.")
    return history[-1].plan


def record(network: nn.Module, done: Applied) -> None:
    """Add to what ``applied`` gives."""
    record_all(network, (*applied(network), done))


def record_all(network: nn.Module, history: tuple[Applied, ...]) -> None:
    """What ``applied`` is to give."""
    if isinstance(network, fx.GraphModule):
        network.meta[_KEY] = history  # what copy.deepcopy keeps of one
    setattr(network, f"_{_KEY}", history)  # what pickling keeps


def announce(name: str, plan: Plan, network: nn.Module) -> None:
    """Tell that a pass carried a plan out: to the logger, which TORCH_LOGS="+fxfact" shows, and to PyTorch's structured
    trace (TORCH_TRACE), with the graph that came out.
    """
    _log.info("%s carried out:\n%s", name, plan)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"{_KEY}_{name}", "encoding": "string"},
        payload_fn=lambda: f"{plan}\n\n{_shown(network)}",
    )


def _shown(network: nn.Module) -> str:
    return str(network.print_readable(print_output=False) if isinstance(network, fx.GraphModule) else network)
