"""What data-free factorization costs: every trained network at its task, before and after, without fine-tuning.

    python -m benchmarks.accuracy                     # rank 0.5, about a quarter of an hour on two cores
    python -m benchmarks.accuracy --rank 0.9 0.75 --networks resnet20 dncnn

Needs the trained weights and data sets (FXFACT_DATA). Every convolution is rewritten that the factorization takes.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import fxfact
from benchmarks.networks import NETWORKS
from benchmarks.report import save, show
from benchmarks.tasks import TASKS
from fxfact.factorizations import FACTORIZATIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=float, nargs="+", default=[0.5], help="fractions of the parameters")
    parser.add_argument("--networks", nargs="+", choices=list(TASKS), default=list(TASKS))
    given = parser.parse_args()
    content: dict[str, Any] = {}
    for rank in given.rank:
        rows = []
        for name in given.networks:
            task, model = TASKS[name], NETWORKS[name].load()
            row: dict[str, Any] = {"network": name, "unit": task.unit, "dense": task.figure(model)}
            for kind in FACTORIZATIONS:
                network = fxfact.factorize(model, kind(), rank=rank)
                rewritten = fxfact.plan_of(network).rewrites
                row[kind.name] = task.figure(network) if rewritten else None
                print(f"{name}, {kind.name}, rank {rank}: {row[kind.name]}", file=sys.stderr)
            rows.append(row)
        content[str(rank)] = rows
        show(f"Every convolution at {rank} of its parameters, data-free, no fine-tuning", rows, ".2f")
    save("accuracy", content)


if __name__ == "__main__":
    main()
