"""What passes record on a network: the plans that were applied to it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    """A plan that was applied.

    Attributes:
        plan: the plan.
        relative_error: ‖W − Ŵ‖_F / ‖W‖_F of each rewritten kernel by path. None if weights were left empty.
        weight_digest: the ``tensor_digest`` of the stages' weights that have this error, by path.
    """

    plan: Plan
    relative_error: Mapping[str, float | None]
    weight_digest: Mapping[str, str] = field(default_factory=dict)


def pass_history(network: nn.Module | ExportedProgram) -> tuple[PassRecord, ...]:
    """Return the record of every plan that was applied to a network.

    Args:
        network: a network. Copying and pickling keep its records.

    Returns:
        The records, oldest first.
    """
    module = network.graph_module if isinstance(network, ExportedProgram) else network
    return tuple(get_metadata(module) or ())


def last_plan(network: nn.Module | ExportedProgram) -> Plan:
    """Return the plan that was applied last. Raises PlanError if there is none."""
    history = pass_history(network)
    if not history:
        raise PlanError(f"{type(network).__name__} was not made by a plan. fxfact.factorize returns one that was.")
    return history[-1].plan


def add_record(network: nn.Module, record: PassRecord) -> None:
    """Append a record to the history of a network."""
    set_history(network, (*pass_history(network), record))


def set_history(network: nn.Module, history: tuple[PassRecord, ...]) -> None:
    """Replace the history of a network."""
    set_metadata(network, history)


def update_plan(network: nn.Module, **changes: Any) -> None:
    """Change fields of the plan that was applied last, if there is one."""
    *earlier, last = pass_history(network) or (None,)
    if last is not None:
        set_history(network, (*earlier, replace(last, plan=replace(last.plan, **changes))))


def log_pass(name: str, plan: Plan, network: nn.Module) -> None:
    """Log that a pass applied a plan.

    ``TORCH_LOGS="+fxfact"`` shows the logger. PyTorch's structured trace (``TORCH_TRACE``) gets the new graph too.
    """
    if _log.isEnabledFor(logging.INFO):
        _log.info("%s applied:\n%s", name, plan.table())  # the whole table: a log is no terminal
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"fxfact_{name}", "encoding": "string"},
        payload_fn=lambda: f"{plan.table()}\n\n{_readable(network)}",
    )


def _readable(network: nn.Module) -> str:
    if not isinstance(network, fx.GraphModule):
        return str(network)
    try:
        return str(network.print_readable(print_output=False))
    except AssertionError:  # raised by PyTorch 2.11 if a child is scripted
        return network.code
