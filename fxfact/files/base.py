"""What was done to a network, as text that goes into its file."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

from fxfact.errors import FileError, FxfactError, place
from fxfact.factorizations import Factorization
from fxfact.passes import Applied
from fxfact.planning import Plan
from fxfact.writing import check_path

_FORMAT = {"format": "fxfact network", "version": 1}
Kinds = Sequence[type[Factorization]]


def history_to_text(history: Sequence[Applied]) -> str:
    """JSON of every plan carried out, oldest first, with the errors of its kernels."""
    done = [{"plan": one.plan.to_json(), "relative_error": dict(one.relative_error)} for one in history]
    return json.dumps({**_FORMAT, "history": done})


def history_from_text(path: str | os.PathLike[str], text: object, kinds: Kinds) -> tuple[Applied, ...]:
    """The inverse. Raises FileError."""
    try:
        data: Any = json.loads(text) if isinstance(text, str | bytes) else None
        if not isinstance(data, Mapping) or {key: data.get(key) for key in _FORMAT} != _FORMAT:
            raise FileError(f"expected {_FORMAT}, found {str(data)[:80]}")
        return tuple(
            Applied(Plan.from_json(one["plan"], factorizations=kinds), _errors(one["relative_error"]))
            for one in data["history"]
        )
    except (ValueError, KeyError, TypeError, RecursionError, FxfactError) as error:
        raise FileError(f"{path}: it does not say what was done to the network: {error}. Save it again.") from error


def names_in(path: str | os.PathLike[str]) -> list[str]:
    """What a zip archive holds, each name without the folder that all are in. Raises FileError for other files,
    ArgumentTypeError.
    """
    check_path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged, names = archive.testzip(), archive.namelist()
    except FileNotFoundError as error:
        raise FileError(f"{path}: there is no such file") from error
    except Exception as error:  # whatever the reader finds
        raise FileError(f"{path}: this is no network that can be read, or not all of it: {error}") from error
    if damaged is not None:
        raise FileError(f"{path}: the file is damaged: {damaged} is not what was written")
    return [name.partition("/")[2] for name in names]


def _errors(values: Any) -> dict[str, float | None]:
    with place("relative_error"):
        if not isinstance(values, Mapping) or not all(v is None or isinstance(v, int | float) for v in values.values()):
            raise FileError(f"expected numbers by path, found {str(values)[:80]}")
    return {str(path): None if value is None else float(value) for path, value in values.items()}
