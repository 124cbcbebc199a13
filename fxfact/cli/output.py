"""Prints results to stdout, as text or JSON, and progress to stderr."""

from __future__ import annotations

import sys
from typing import Any

from fxfact.cli.options import Arguments
from fxfact.conv import Cost
from fxfact.errors import ArgumentError
from fxfact.planning import Plan, check_plot_path
from fxfact.utils import as_json


def plan_summary(plan: Plan) -> dict[str, Any]:
    """Return the totals of a plan as JSON values."""

    def as_dict(cost: Cost) -> dict[str, int | None]:
        return {"parameters": cost.params, "macs": cost.macs}

    return {
        "before": as_dict(plan.network),
        "after": as_dict(plan.after),
        "rewritten": len(plan.rewrites),
        "convolutions": len(plan),
        "predicted_loss_increase": plan.predicted_loss_increase,
        "measured_loss_increase": plan.measured_loss_increase,
    }


def print_progress(text: str) -> None:
    """Print a line of progress. On a terminal it replaces the previous one."""
    if sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def print_text(text: str) -> None:
    """Print a result. On a terminal it replaces the line of progress."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    print(text)


def print_result(args: Arguments, text: object, data: dict[str, Any]) -> None:
    """Print ``data`` as JSON if ``--json`` was passed, else ``text``."""
    print(as_json(data) if args.json else text)


def check_plot(args: Arguments) -> None:
    """Raise ArgumentError if the picture of ``--plot`` cannot be drawn, before anything is computed."""
    if args.plot is None:
        return
    check_plot_path(args.plot)
    if getattr(args, "rank", None) is not None:
        raise ArgumentError("--plot draws what every other budget would cost, and --rank is no budget. Remove it.")


def plot_front(args: Arguments, plan: Plan) -> None:
    """Draw the Pareto front of a plan if ``--plot`` was passed."""
    if args.plot is not None:
        plan.pareto_front.plot(args.plot)
