from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import fxfact

pytestmark = pytest.mark.integration


def test_report_page_works_in_a_browser(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no browser here: install chromium")
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Conv2d(12, 12, 3) for _ in range(3))).eval(), torch.randn(2, 12, 9, 9)
    report = fxfact.report(model, fxfact.factorize(model, "tucker", rank=0.5, example_inputs=x), x)
    chains = sum(bool(block.stages) for block in report.diagrams[1].blocks)
    click = "<script>document.getElementById('all').click(); console.log('clicked')</script>"
    page = tmp_path / "report.html"
    page.write_text(report.to_html().replace("</body>", f"{click}</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/profile"]
    done = subprocess.run(
        [browser, *flags, "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    messages = re.findall(r'CONSOLE.*?\] "(.*?)"', done.stderr)
    assert messages == ["clicked"]
    assert done.stdout.count('class="chain open"') == chains == 3
