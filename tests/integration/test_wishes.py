"""What the README says that you type for what you want: every line runs and does it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxfact
from fxfact.cli import main

pytestmark = pytest.mark.integration

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## What you want, and what you type")[2].partition("\n## ")[0]
ROWS = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in SECTION.splitlines() if line[:2] == "| "]
WISHES = {wish: [line.strip("`") for line in typed.split("<br>")] for wish, typed in ROWS[1:]}


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """The names that the quickstart defines, a metric, and a plan for the wishes that begin with one."""
    found: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0], found)
    images = found["batches"][0]
    target = found["model"](images).argmax(1)
    found["evaluate"] = lambda network: float(100 * (network(images).argmax(1) == target).float().mean())
    found["plan"] = fxfact.plan(found["model"], budget=fxfact.Macs(0.5), calibration=found["batches"])
    return found


def build_model() -> nn.Module:
    """The model of the wish for the shell."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(3, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ]
        return nn.Sequential(*layers, nn.Linear(32, 10)).eval()


def test_there_are_ten_wishes_of_at_most_three_lines() -> None:
    assert len(WISHES) == 10
    assert all(1 <= len(lines) <= 3 for lines in WISHES.values())


@pytest.mark.parametrize("wish", [wish for wish, lines in WISHES.items() if not lines[0].startswith("fxfact ")])
def test_wish_is_met_by_what_the_readme_types(
    wish: str, names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    given = dict(names)
    exec("\n".join(WISHES[wish]), given)
    if "small" not in "".join(WISHES[wish]):
        assert len(capsys.readouterr().out) > 100
        return
    small, dense = given["small"], fxfact.plan_of(given["small"]).network
    after = fxfact.plan_of(small).after
    assert small(names["batches"][0]).shape == (32, 10)
    if "computation" in wish:
        assert after.macs is not None
        assert dense.macs is not None
        assert 0.45 * dense.macs <= after.macs <= 0.5 * dense.macs
    if "parameters" in wish:
        assert sum(p.numel() for p in small.parameters()) <= 0.5 * sum(p.numel() for p in names["model"].parameters())
    if "metric" in wish:
        assert names["evaluate"](names["model"]) - names["evaluate"](small) <= 0.5
    if "keep some layers" in wish:
        assert isinstance(small.get_submodule("0.0"), nn.Conv2d)


@pytest.mark.parametrize("wish", [wish for wish, lines in WISHES.items() if lines[0].startswith("fxfact ")])
def test_wish_for_the_shell_is_met(wish: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="an extra: pip install onnx onnxruntime onnxscript")
    pytest.importorskip("onnxscript", reason="an extra: pip install onnx onnxruntime onnxscript")
    images = np.random.default_rng(0).standard_normal((16, 3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    monkeypatch.chdir(tmp_path)
    (command,) = WISHES[wish]
    arguments = shlex.split(command.replace("my_package:build_model", f"{__name__}:build_model"))[1:]
    monkeypatch.setattr("sys.path", [*__import__("sys").path, str(tmp_path)])
    assert main(arguments) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    (output,) = session.run(None, {session.get_inputs()[0].name: images[:1]})
    assert output.shape == (1, 10)
