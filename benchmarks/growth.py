"""Seconds of planning by MACs without data, and of the whole transformation, for ever deeper ResNets at 224².

    python -m benchmarks.growth

The weights are random, which changes nothing. ``ms a layer`` is the planning time for one convolution. It stays about
the same if nothing grows faster than the number of layers.
"""

from __future__ import annotations

import argparse
import time

import torch

import fxfact
from benchmarks.networks import BasicBlock, Bottleneck, ResNet
from benchmarks.report import save, show

DEPTHS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", choices=list(DEPTHS), default=list(DEPTHS))
    parser.add_argument("--budget", type=float, default=0.5, help="as a share of the MACs")
    given = parser.parse_args()
    x, rows = torch.randn(1, 3, 224, 224), []
    for depth in given.depths:
        torch.manual_seed(0)
        model = ResNet(*DEPTHS[depth]).eval()
        started = time.perf_counter()
        plan = fxfact.plan(model, budget=fxfact.Macs(given.budget), example_inputs=x)
        planned = time.perf_counter() - started
        fxfact.apply(plan, model)
        rows.append({
            "network": f"ResNet-{depth}", "convolutions": len(plan), "plan s": planned,
            "ms a layer": 1e3 * planned / len(plan), "apply s": time.perf_counter() - started - planned,
        })  # fmt: skip
        print(rows[-1], flush=True)
    show(f"{torch.get_num_threads()} threads", rows)
    save("growth", {"rows": rows})


if __name__ == "__main__":
    main()
