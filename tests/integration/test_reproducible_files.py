"""Two equal runs, in two processes and two folders, write the same bytes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(4, 12, 3, padding=1), nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12)
        self.twin, self.head = nn.Conv2d(12, 12, 3, groups=2), nn.Linear(12, 5)

    def forward(self, image, *, scale=None):
        hidden = self.norm(self.second(self.first(image).relu())).relu()
        hidden = hidden if scale is None else hidden * scale["by"]
        return {"logits": self.head(self.twin(hidden).mean((2, 3))), "hidden": hidden}
"""
RUN = """
import os
import sys
import torch
import fxfact
from network import Net

stem = sys.argv[1]
torch.manual_seed(0)
model, image = Net().eval(), torch.randn(4, 4, 10, 10)
batches = [torch.randn(8, 4, 10, 10) for _ in range(4)]
statistics = fxfact.calibrate(model, batches, example_inputs=image, likelihood="gaussian")
statistics.save(f"{stem}.npz")
curves = fxfact.ErrorCurveCache()
budget = {"budget": fxfact.Macs(0.6), "calibration": statistics, "example_inputs": image, "include": ["*i*", "second"]}
plan = fxfact.plan(model, ["tucker", "tt", "channel_svd", "spatial_svd"], error_curves=curves, **budget)
plan.save(f"{stem}.json")
curves.save(f"{stem}.curves.json")
small = fxfact.apply(plan, model, calibration=statistics)
fxfact.save(small, f"{stem}.pt")
fxfact.save(fxfact.factorize(model, rank=0.5, example_inputs=image, capture="modules"), f"{stem}.modules.pt")
batch = torch.export.Dim("batch", max=64)
height, width = torch.export.Dim("height", min=8), torch.export.Dim("width", min=8)
shapes = {"image": {0: batch, 2: height, 3: width}, "scale": {"by": {0: batch}}}
arguments = (image,), {"scale": {"by": torch.ones(4, 1, 1, 1)}}
program = torch.export.export(model, *arguments, dynamic_shapes=shapes)
fxfact.save(fxfact.factorize(program, "cp", rank=0.5), f"{stem}.pt2")
fxfact.save(torch.export.export(small, (image,)), f"{stem}.traced.pt2")
"""


def run(folder: Path, stem: str, seed: int) -> dict[str, str]:
    """Write all files in a process of its own. Return the digests by the endings of the names."""
    folder.mkdir(parents=True)
    (folder / "network.py").write_text(NETWORK)
    (folder / "run.py").write_text(RUN)
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "run.py", stem], cwd=folder, env=environment, check=True, timeout=600)
    files = sorted(folder.glob(f"{stem}.*"))
    return {path.name.removeprefix(stem): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_two_processes_write_equal_files(tmp_path: Path) -> None:
    one = run(tmp_path / "here", "one", 1)
    other = run(tmp_path / "some" / "where" / "else", "another_name", 2)
    assert len(one) == 7
    assert one == other
    for name in ("one.pt2", "one.traced.pt2", "one.json"):
        assert str(tmp_path).encode() not in (tmp_path / "here" / name).read_bytes()
