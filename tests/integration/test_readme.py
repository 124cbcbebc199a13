"""The Python code of the README runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_code_outside_the_recipes_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FXFACT_CACHE", str(tmp_path))
    text = re.sub(
        r"<details>.*?</details>", "", README, flags=re.DOTALL
    )  # tests/integration/test_recipes.py runs these
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 10
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    assert "captured as one graph ('trace')" in capsys.readouterr().out
