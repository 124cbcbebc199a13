"""Every recipe of the README runs and does what it says."""

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

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)
RECIPES = {
    title: PYTHON.findall(text)
    for title, text in re.findall(r"<details><summary>(.*?)</summary>(.*?)</details>", README, flags=re.DOTALL)
}
MODEL = PYTHON.findall(README)[0].split("\nsmall = ")[0]  # the quickstart up to its model and data
PRELUDE = PYTHON.findall(README.split("\n## Recipes\n")[1])[0]


def test_every_recipe_has_a_check() -> None:
    assert set(RECIPES) == {*CHECKS, "AOTInductor", "Several processes"}
    assert all(RECIPES.values())


def run_recipe(title: str) -> dict[str, Any]:
    """Return the names that a recipe defines."""
    namespace: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in (MODEL, PRELUDE, *RECIPES[title]):
        exec(block, namespace)
    return namespace


def check_equal_outputs(namespace: dict[str, Any], *names: str) -> None:
    with torch.no_grad():
        expected = namespace["small"](namespace["x"])
        for name in names:
            torch.testing.assert_close(namespace[name](namespace["x"]), expected, rtol=1e-4, atol=1e-4)


def check_compiled(namespace: dict[str, Any]) -> None:
    check_equal_outputs(namespace, "compiled", "inside")
    torch._dynamo.reset()


def check_passes(namespace: dict[str, Any]) -> None:
    assert len(namespace["plan"].rewrites) == 3
    assert {d.factorization for d in namespace["plan"].rewrites} == {Tucker()}
    assert sum(p.numel() for p in namespace["small"].parameters()) == namespace["plan"].after.params


def check_exported(namespace: dict[str, Any]) -> None:
    x, small = namespace["x"], namespace["small"]
    torch.testing.assert_close(namespace["program"].module()(x[:3]), small(x[:3]))
    loaded = torch.export.load("small.pt2").module()
    torch.testing.assert_close(loaded(x), namespace["other"].module()(x))


def check_onnx(namespace: dict[str, Any]) -> None:
    assert namespace["found"].shape == (8, 10)
    assert float(namespace["difference"].detach()) < 1e-4


def check_quantized(namespace: dict[str, Any]) -> None:
    """On images that were not used for calibration, int8 loses little compared with the ranks."""
    tests = TASKS["resnet20"].tests()
    accuracies = {}
    for name in ("model", "small", "quantized"):
        runs = zip(range(4), tests.run(namespace[name]), strict=False)
        accuracies[name] = float(torch.cat([scores for _, (_, scores) in runs]).double().mean())
    print(accuracies)
    assert accuracies["model"] > 90
    assert accuracies["small"] > 88
    assert accuracies["quantized"] > accuracies["small"] - 2
    assert any(".dequantize_per" in str(node.target) for node in namespace["quantized"].graph.nodes)


def check_scripted(namespace: dict[str, Any]) -> None:
    check_equal_outputs(namespace, "traced")
    namespace["loaded"] = torch.jit.load("small.torchscript")
    check_equal_outputs(namespace, "loaded")


def check_trained(namespace: dict[str, Any]) -> None:
    losses = namespace["losses"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert namespace["half"](namespace["x"].bfloat16()).dtype == torch.bfloat16


def check_hugging_face(namespace: dict[str, Any]) -> None:
    x, original = torch.randn(3, 3, 64, 64), namespace["model"]
    with torch.no_grad():
        expected = namespace["small"](pixel_values=x).logits
        torch.testing.assert_close(namespace["again"](pixel_values=x).logits, expected)
        torch.testing.assert_close(namespace["program"].module()(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(expected, original(pixel_values=x).logits, rtol=0.5, atol=0.5)
    plan = fxfact.plan_of(namespace["small"])
    assert plan.after.macs <= 0.5 * plan.network.macs


def check_functional(namespace: dict[str, Any]) -> None:
    gradients, small, x = namespace["gradients"], namespace["small"], namespace["x"]
    small(x[3:4]).square().sum().backward()
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(gradients[name][3], parameter.grad, rtol=1e-3, atol=1e-3)


def check_copied(namespace: dict[str, Any]) -> None:
    check_equal_outputs(namespace, "again", "empty", "twin", "pickled")


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "torch.compile": check_compiled,
    "torch.fx passes of your own": check_passes,
    "torch.export": check_exported,
    "ONNX": check_onnx,
    "Quantization": check_quantized,
    "TorchScript": check_scripted,
    "Training, mixed precision": check_trained,
    "Hugging Face": check_hugging_face,
    "torch.func": check_functional,
    "Checkpoints, copies, pickles": check_copied,
}
PACKAGES = {
    "ONNX": ("onnx", "onnxscript", "onnxruntime"),
    "Quantization": ("torchao",),
    "Hugging Face": ("transformers",),
}
WITH_DATA = ("Quantization", "Training, mixed precision", "Several processes")
needs_data = pytest.mark.skipif(
    data_folder() is None, reason="trained weights are missing: set FXFACT_DATA to their folder"
)


@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=[needs_data] if title in WITH_DATA else []) for title in CHECKS]
)
def test_recipe_runs(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in PACKAGES.get(title, ()):
        pytest.importorskip(package, reason="a package of the recipe is missing: pip install '.[recipes]'")
    monkeypatch.chdir(tmp_path)
    CHECKS[title](run_recipe(title))


def test_aotinductor_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert float(run_recipe("AOTInductor")["difference"]) < 1e-4


@needs_data
def test_finetuning_in_two_processes_raises_the_accuracy(tmp_path: Path) -> None:
    (script,) = RECIPES["Several processes"]
    (tmp_path / "finetune.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "finetune.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=600,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"accuracy (\S+) before, (\S+) after", done.stdout)
    assert found
    before, after = map(float, found.groups())
    assert before < 0.5
    assert after > before + 0.2
