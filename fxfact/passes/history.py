"""What the passes leave behind on a graph module for whoever inspects it later."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from torch._logging._internal import trace_structured
from torch.export import ExportedProgram

from fxfact.errors import PlanError
from fxfact.planning import Plan
from fxfact.utils import get_metadata, set_metadata

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassRecord:
    """A plan that was carried out; ``relative_error`` ‖W − Ŵ‖_F / ‖W‖_F by path, None where weights were left empty."""

    plan: Plan
    relative_error: Mapping[str, float | None]


def pass_history(network: nn.Module | ExportedProgram) -> tuple[PassRecord, ...]:
    """Every plan carried out on this network, oldest first; they survive copying and pickling."""
    module = network.graph_module if isinstance(network, ExportedProgram) else network
    return tuple(get_metadata(module) or ())


def last_plan(network: nn.Module | ExportedProgram) -> Plan:
    """The plan carried out last on it. Raises PlanError where there is none."""
    history = pass_history(network)
    if not history:
        raise PlanError(f"{type(network).__name__} was not made by a plan. fxfact.factorize returns one that was.")
    return history[-1].plan


def add_record(network: nn.Module, done: PassRecord) -> None:
    """Add to what ``applied`` gives."""
    set_history(network, (*pass_history(network), done))


def set_history(network: nn.Module, history: tuple[PassRecord, ...]) -> None:
    """What ``applied`` is to give."""
    set_metadata(network, history)


def update_plan(network: nn.Module, **changed: Any) -> None:
    """Change what the plan carried out last on it says, where there is one."""
    *earlier, last = pass_history(network) or (None,)
    if last is not None:
        set_history(network, (*earlier, replace(last, plan=replace(last.plan, **changed))))


def log_pass(name: str, plan: Plan, network: nn.Module) -> None:
    """Tell that a pass carried a plan out: to the logger, which TORCH_LOGS="+fxfact" shows, and to PyTorch's structured
    trace (TORCH_TRACE), with the graph that came out.
    """
    _log.info("%s carried out:\n%s", name, plan)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"fxfact_{name}", "encoding": "string"},
        payload_fn=lambda: f"{plan}\n\n{_shown(network)}",
    )


def _shown(network: nn.Module) -> str:
    if not isinstance(network, fx.GraphModule):
        return str(network)
    try:
        return str(network.print_readable(print_output=False))
    except AssertionError:  # of PyTorch 2.11, where a child is scripted
        return network.code
