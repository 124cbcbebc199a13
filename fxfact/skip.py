"""The ordinary value that says why something is left as it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Skip:
    """Why ``subject`` (the path of a convolution, or the name of a node) is left alone."""

    reason: str
    subject: str = ""
