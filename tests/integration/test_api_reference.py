"""The API reference renders from the docstrings."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fxfact

pytestmark = pytest.mark.integration


def test_pdoc_renders_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="pip install -e '.[dev]'")
    command = [sys.executable, "-m", "pdoc", "-d", "google", "fxfact", "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    page = (tmp_path / "fxfact.html").read_text(encoding="utf-8")
    names = [name for name in fxfact.__all__ if not inspect.ismodule(getattr(fxfact, name))]
    assert all(f'id="{name}"' in page for name in names)
