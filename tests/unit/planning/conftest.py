"""A classifier, data for it, and error curves that tests share."""

from __future__ import annotations

import pytest

import fxfact


@pytest.fixture(scope="session")
def error_curves() -> fxfact.ErrorCurveCache:
    """Curves that tests share, so that each is computed once."""
    return fxfact.ErrorCurveCache()
