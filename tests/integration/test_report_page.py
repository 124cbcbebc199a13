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

_CLICKS = """
document.getElementById("all").click();
const sort = (name) => [...document.querySelectorAll("th button")].find((each) => each.textContent === name).click();
const order = () => [...document.querySelectorAll("tbody tr")].map((row) => row.dataset.layer).join(" ");
const log = (text) => console.log(text);
sort("layer"); log(`by name: ${order()}`);
sort("layer"); log(`backwards: ${order()}`);
sort("parameters"); log(`largest first: ${order()}`);
sort("kernel error"); log(`without an error last: ${order()}`);
const square = document.querySelector(".map i[data-layer='2']");
square.click(); log(`found: ${document.querySelector("tr.found").dataset.layer}`);
square.dispatchEvent(new PointerEvent("pointermove", { bubbles: true }));
log(`tip: ${document.getElementById("tip").textContent.split("\\n")[0]} ${document.getElementById("tip").hidden}`);
log(`fits: ${document.documentElement.scrollWidth <= innerWidth}`);
"""


def browse(page: Path, profile: Path, width: int = 1400) -> tuple[list[str], str]:
    """Open a page in a browser. Returns the messages of its console, and its source after all scripts ran."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no browser here: install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
        f"--window-size={width},900",
    ]
    done = subprocess.run(
        [browser, *flags, "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return re.findall(r'CONSOLE.*?\] "(.*?)"', done.stderr), done.stdout


@pytest.mark.parametrize("width", [1400, 900, 500])
def test_report_page_works_in_a_browser(width: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = [(12, 12), (12, 20), (20, 8), (8, 8)]
    model, x = nn.Sequential(*(nn.Conv2d(*each, 3) for each in sizes)).eval(), torch.randn(2, 12, 11, 11)
    data = {"calibration": [x], "example_inputs": x, "exclude": "3"}
    small = fxfact.factorize(model, "tucker", budget=fxfact.Macs(0.7), **data)
    report = fxfact.report(model, small, x)
    chains = sum(bool(block.stages) for block in report.diagrams[1].blocks)
    page = tmp_path / "report.html"
    source = report.to_html().replace("</body>", f"<script>{_CLICKS}</script></body>")
    page.write_text(source, encoding="utf-8")
    messages, dom = browse(page, tmp_path / "profile", width)
    by_size = sorted(report.convolutions, key=lambda conv: -conv.after.params)
    assert messages[:3] == [
        "by name: 0 1 2 3",
        "backwards: 3 2 1 0",
        f"largest first: {' '.join(conv.path for conv in by_size)}",
    ]
    assert messages[3].endswith(" 3"), "it is dense"
    assert messages[4:] == ["found: 2", "tip: 2 false", "fits: true"]
    assert dom.count('class="chain open"') == chains > 0
    assert '<svg class="front"' in dom
