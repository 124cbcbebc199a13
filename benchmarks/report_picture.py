"""Make the README's picture of a report: factorize a trained network, report it, and take a screenshot.

    python -m benchmarks.report_picture

It needs Chromium (``apt-get install chromium``) and the trained networks in the folder FXFACT_DATA.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import fxfact
from benchmarks.networks import NETWORKS
from benchmarks.tasks import TASKS

PICTURE = Path(__file__).parents[1] / ".github" / "report.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(TASKS), default="resnet20")
    parser.add_argument("--factorizations", nargs="+", default=["tucker", "channel_svd", "spatial_svd"])
    parser.add_argument("--macs", type=float, default=0.5, help="share of the network's MACs")
    parser.add_argument("--samples", type=int, default=512, help="number of calibration samples")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, nargs=2, default=(1400, 1100), help="width and height in pixels")
    parser.add_argument("--page", type=Path, help="also write the page to this file")
    parser.add_argument("--output", type=Path, default=PICTURE)
    given = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        parser.error("no browser was found: apt-get install chromium")
    torch.set_num_threads(given.threads)
    model, batches = NETWORKS[given.network].load(), TASKS[given.network].batches(given.samples, 0)
    options = {"budget": fxfact.Macs(given.macs), "calibration": batches, "example_inputs": batches[0]}
    small = fxfact.factorize(model, given.factorizations, **options)
    page = fxfact.report(model, small, batches[0]).to_html()
    with tempfile.TemporaryDirectory() as folder:
        path = given.page or Path(folder) / "report.html"
        path.write_text(page, encoding="utf-8")
        width, height = given.size
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        flags += [f"--user-data-dir={folder}/profile", f"--window-size={width},{height}"]
        picture = given.output.resolve()
        command = [browser, *flags, f"--screenshot={picture}", path.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    print(given.output)


if __name__ == "__main__":
    main()
