from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

_SAVE_AND_KILL = """
import os, random, signal, sys, time
import torch, fxfact
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)
path = sys.argv[1]
model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 3))
small = fxfact.factorize(model, "tucker", rank=0.5)
started = time.perf_counter()
fxfact.save(small, path)
took = time.perf_counter() - started
with torch.no_grad():
    first = {float(p.flatten()[0]) for p in small.parameters()}
random.seed(0)
killed = written = 0
for turn in range(100):
    child = os.fork()
    if not child:
        while True:
            for parameter in small.parameters():
                parameter.data.fill_(turn)
            fxfact.save(small, path)
    time.sleep(random.uniform(0, 4 * took))
    os.kill(child, signal.SIGKILL)
    killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with torch.no_grad():
        values = {float(p.flatten()[0]) for p in fxfact.load(path, model).parameters()}
    assert values == first or len(values) == 1, values
    written += len(values) == 1
print(killed, written > 10)
"""


def test_save_leaves_a_whole_file_if_the_process_is_killed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SAVE_AND_KILL, str(tmp_path / "small.pt")],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "100 True", done.stderr
