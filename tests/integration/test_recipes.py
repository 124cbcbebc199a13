"""Every page of the README's "Use it with" runs, and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxfact
from benchmarks.networks import data_folder
from benchmarks.tasks import TASKS
from fxfact.factorizations import Tucker

ROOT = Path(__file__).parents[2]
_, SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Use it with\n")
PRELUDE, *PAGES = re.split(r"^### ", SECTION.split("\n## ", 1)[0], flags=re.MULTILINE)
RECIPES = {page.partition("\n")[0]: re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) for page in PAGES}

pytestmark = pytest.mark.skipif(
    data_folder() is None, reason="trained weights are not here: set FXFACT_DATA to their folder"
)


def test_every_page_has_a_check() -> None:
    assert set(RECIPES) == {*CHECKS, "AOTInductor", "Several processes"}
    assert all(RECIPES.values())


def ran(name: str) -> dict[str, Any]:
    """What is defined after a page."""
    room: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in [*re.findall(r"```python\n(.*?)```", PRELUDE, flags=re.DOTALL), *RECIPES[name]]:
        exec(block, room)
    return room


def agree(room: dict[str, Any], *names: str) -> None:
    with torch.no_grad():
        expected = room["small"](room["x"])
        for name in names:
            torch.testing.assert_close(room[name](room["x"]), expected, rtol=1e-4, atol=1e-4)


def compiled(room: dict[str, Any]) -> None:
    agree(room, "compiled", "inside")
    torch._dynamo.reset()


def passes(room: dict[str, Any]) -> None:
    assert len(room["plan"].rewrites) == 19
    assert {d.factorization for d in room["plan"].rewrites} == {Tucker()}
    assert sum(p.numel() for p in room["small"].parameters()) == room["plan"].after.params


def exported(room: dict[str, Any]) -> None:
    torch.testing.assert_close(room["program"].module()(room["x"][:3]), room["small"](room["x"][:3]))
    read = torch.export.load("small.pt2").module()
    torch.testing.assert_close(read(room["x"]), room["other"].module()(room["x"]))


def onnx(room: dict[str, Any]) -> None:
    assert room["found"].shape == (8, 10)
    assert float(room["difference"].detach()) < 1e-4


def quantized(room: dict[str, Any]) -> None:
    """Tested on images that nothing was calibrated on; the loss by int8 stays small beside that of the ranks."""
    tests = TASKS["resnet20"].tests()
    figures = {}
    for name in ("model", "small", "quantized"):
        runs = zip(range(4), tests.run(room[name]), strict=False)
        figures[name] = float(torch.cat([scores for _, (_, scores) in runs]).double().mean())
    print(figures)
    assert figures["model"] > 90
    assert figures["small"] > 88
    assert figures["quantized"] > figures["small"] - 2
    assert any(".dequantize_per" in str(node.target) for node in room["quantized"].graph.nodes)


def scripted(room: dict[str, Any]) -> None:
    agree(room, "traced")
    room["read"] = torch.jit.load("small.torchscript")
    agree(room, "read")


def trained(room: dict[str, Any]) -> None:
    losses = room["losses"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert room["half"](room["x"].bfloat16()).dtype == torch.bfloat16


def hugging_face(room: dict[str, Any]) -> None:
    x, original = torch.randn(3, 3, 64, 64), room["model"]
    with torch.no_grad():
        expected = room["small"](pixel_values=x).logits
        torch.testing.assert_close(room["again"](pixel_values=x).logits, expected)
        torch.testing.assert_close(room["program"].module()(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(expected, original(pixel_values=x).logits, rtol=0.5, atol=0.5)
    plan = fxfact.plan_of(room["small"])
    assert plan.after.macs <= 0.5 * plan.network.macs


def functional(room: dict[str, Any]) -> None:
    gradients, small, x = room["gradients"], room["small"], room["x"]
    small(x[3:4]).square().sum().backward()
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(gradients[name][3], parameter.grad, rtol=1e-3, atol=1e-3)


def copied(room: dict[str, Any]) -> None:
    agree(room, "again", "empty", "twin", "pickled")


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "torch.compile": compiled,
    "torch.fx passes of your own": passes,
    "torch.export": exported,
    "ONNX": onnx,
    "Quantization": quantized,
    "TorchScript": scripted,
    "Training, mixed precision": trained,
    "Hugging Face": hugging_face,
    "torch.func": functional,
    "Checkpoints, copies, pickles": copied,
}
NEEDS = {"ONNX": ("onnx", "onnxscript", "onnxruntime"), "Quantization": ("torchao",), "Hugging Face": ("transformers",)}


@pytest.mark.parametrize("name", CHECKS)
def test_the_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package, reason="a recipe's package is not here: pip install 'fxfact[recipes]'")
    monkeypatch.chdir(tmp_path)
    CHECKS[name](ran(name))


@pytest.mark.slow
def test_aotinductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert float(ran("AOTInductor")["difference"]) < 1e-4


def test_several_processes_raise_the_accuracy(tmp_path: Path) -> None:
    (script,) = RECIPES["Several processes"]
    (tmp_path / "finetune.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "finetune.py"],
        capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"accuracy (\S+) before, (\S+) after", done.stdout)
    assert found
    before, after = map(float, found.groups())
    assert before < 0.5
    assert after > before + 0.2
