"""Seconds and memory of calibrating a network, and of planning and carrying out a budget, at first and again.

    python -m benchmarks.planning                                  # ResNet-18 at 224², 512 images: a few minutes
    python -m benchmarks.planning --network vgg16                  # or resnet50, unet, vit_b16
    python -m benchmarks.planning --factorizations cp channel_svd  # some of the factorizations
    python -m benchmarks.planning --workers 2                      # errors and kernels in two processes

Weights and images are random, which changes neither time nor memory. "CPU s" are the processor's seconds in this
process, which depend less on what else runs. The peak of each step is the kernel's own count of
resident pages (VmHWM) above what the model and the images take (Linux).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import fxfact
from benchmarks.memory import reset_peak, resident
from benchmarks.networks import NETWORKS
from benchmarks.report import save, show
from benchmarks.untrained import TIMED
from fxfact.utils import processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["resnet18", "resnet50", "vgg16", "unet", "vit_b16"], default="resnet18")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--budget", type=float, default=0.5, help="as a share of the MACs")
    parser.add_argument("--factorizations", nargs="+", default=None, help="default: all")
    parser.add_argument("--workers", type=int, default=1, help="worker processes, each with one thread; default: none")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = {**TIMED, **NETWORKS}[given.network].build().eval()
    images = torch.randn(given.samples, 3, 224, 224)
    known: dict[str, Any] = {"example_inputs": images[:1], "budget": fxfact.Macs(given.budget)}
    rows: list[dict[str, Any]] = []

    def measured(step: str, run: Callable[[], Any]) -> Any:
        reset_peak()
        before, started, used = resident("VmRSS"), time.perf_counter(), time.process_time()
        result = run()
        seconds = {"s": time.perf_counter() - started, "CPU s": time.process_time() - used}
        rows.append({"step": step, **seconds, "peak GB": (resident("VmHWM") - before) / 1e9})
        print(rows[-1], flush=True)
        return result

    statistics = measured("calibrate", lambda: fxfact.calibrate(model, images.split(given.batch), max_samples=None))

    with processes(given.workers) as executor:
        options: dict[str, Any] = {"executor": executor}
        curves = fxfact.ErrorCurveCache()

        def plan() -> fxfact.Plan:
            return fxfact.plan(
                model, given.factorizations, calibration=statistics, error_curves=curves, **known, **options
            )

        measured("plan", plan)
        found = measured("plan again", plan)
        measured("apply", lambda: fxfact.apply(found, model, calibration=statistics, **options))
    show(f"{given.network}, {given.samples} images of 224², {torch.get_num_threads()} threads", rows)
    save("planning", {"network": given.network, "workers": given.workers, "samples": given.samples, "rows": rows})


if __name__ == "__main__":
    main()
