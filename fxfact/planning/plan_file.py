"""The text of a plan in a file: JSON with one line for each fact, two for each layer, and one for each alternative."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_SECOND_LINE = ("spec", "input_sizes")  # of a layer, which seldom change


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
    second = {key: decision[key] for key in _SECOND_LINE if decision.get(key) is not None}
    first = {key: value for key, value in decision.items() if key not in second and key != "alternatives"}
    lines = [_text(line)[1:-1] for line in (first, second) if line]
    if others := decision.get("alternatives"):
        lines.append('"alternatives": [\n    ' + ",\n    ".join(map(_text, others)) + "]")
    return "{" + ",\n   ".join(lines) + "}"


def _lines(items: Sequence[str]) -> str:
    return "[\n  " + ",\n  ".join(items) + "\n ]" if items else "[]"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
