"""The text of a plan in a file: JSON with one line for each fact, and two for each convolution."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_SECOND_LINE = ("spec", "input_sizes")  # of a convolution, which seldom change


def plan_text(data: Mapping[str, Any]) -> str:
    """Return the JSON of a plan, written so that a change of one convolution changes few lines."""
    members = [f" {_text(key)}: {_member(key, value)}" for key, value in data.items()]
    return "{\n" + ",\n".join(members) + "\n}\n"


def _member(key: str, value: Any) -> str:
    if key == "decisions":
        return _lines([_decision(decision) for decision in value])
    if key in ("outputs", "measured_points", "pareto_points"):
        return _lines([_text(point) for point in value])
    return _text(value)


def _decision(decision: Mapping[str, Any]) -> str:
    second = {key: value for key, value in decision.items() if key in _SECOND_LINE and value is not None}
    first = _text({key: value for key, value in decision.items() if key not in second})
    return f"{first[:-1]},\n   {_text(second)[1:]}" if second else first


def _lines(items: Sequence[str]) -> str:
    return "[\n  " + ",\n  ".join(items) + "\n ]" if items else "[]"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
