from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration


def test_pass_is_in_the_logs_and_the_structured_trace_of_torch(tmp_path: Path) -> None:
    script = (
        "import torch, fxfact\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3), torch.nn.ReLU())\n"
        "fxfact.factorize(net, 'tucker', rank=0.5)\n"
    )
    environment = {**os.environ, "TORCH_LOGS": "+fxfact", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert "FactorizeConvs applied" in done.stderr
    assert "1 of 1 rewritten" in done.stderr
    (log,) = tmp_path.glob("*.log")
    text = log.read_text(encoding="utf-8")
    assert '"artifact": {"name": "fxfact_FactorizeConvs"' in text
    assert "class GraphModule" in text
