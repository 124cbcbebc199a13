"""Warnings that point to the caller's line."""

from __future__ import annotations

import sys
import warnings

_PACKAGES_SKIPPED = {"fxfact", "torch", "contextlib"}  # torch and contextlib wrap decorated functions of ours


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the line, outside of fxfact, that called into it.

    A fixed ``stacklevel`` would depend on how deep the call is and on decorators such as ``torch.no_grad``.
    """
    frame = sys._getframe()
    while frame.f_back is not None and _package_of(frame.f_globals) in _PACKAGES_SKIPPED:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__", "<string>"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _package_of(module_globals: dict[str, object]) -> str:
    return str(module_globals.get("__name__")).partition(".")[0]
