"""What commands print: results on stdout, as text or JSON, and what is under way on stderr."""

from __future__ import annotations

import sys
from typing import Any

from fxfact.cli.inputs import Arguments
from fxfact.conv import Cost
from fxfact.planning import Plan
from fxfact.utils import as_json


def summary(made: Plan) -> dict[str, Any]:
    """A plan in numbers."""

    def cost(value: Cost) -> dict[str, int | None]:
        return {"parameters": value.params, "macs": value.macs}

    return {
        "before": cost(made.network), "after": cost(made.after), "rewritten": len(made.rewrites),
        "convolutions": len(made), "expected_loss_increase": made.predicted_loss_increase, "measured_loss_increase": made.measured_loss_increase,
    }  # fmt: skip


def overwrite(text: str) -> None:
    """A line of progress, instead of the one before where that is possible."""
    if sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """What came out, where progress was."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    print(text)


def show(given: Arguments, text: object, data: dict[str, Any]) -> None:
    """Print a result, as it was asked for."""
    print(as_json(data) if given.json else text)
