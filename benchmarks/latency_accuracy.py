"""Accuracy of trained networks under a budget of milliseconds: fxfact, compared with uniform Tucker at the same speed.

    python -m benchmarks.latency_accuracy                                     # all networks: hours on two cores
    python -m benchmarks.latency_accuracy --networks resnet20 --shares 0.6    # some minutes

``faster`` is the time of the dense network divided by that of the result, both in their fastest forms, measured in
turns. Uniform Tucker uses the largest fraction that measures at least as fast as fxfact, found by bisection. No labels
and no fine-tuning. ``difference`` is the difference from the dense network on the same samples, ``±`` its paired
standard error, and ``KL`` the mean divergence from it, in nats for one sample. Needs the trained weights and data sets
(FXFACT_DATA).
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import nn

import fxfact
from benchmarks.accuracy import Measured
from benchmarks.networks import NETWORKS
from benchmarks.report import save, show
from benchmarks.tasks import TASKS, Task
from fxfact.utils import side_by_side

_BISECTIONS = 6


class Comparison:
    """Measures one trained network. It is timed on a batch of its calibration samples."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        self._task: Task = TASKS[name]
        self._model = NETWORKS[name].load()
        self._measure = Measured(self._task, self._model, given.tests)
        self._batches = self._task.batches(given.samples, 0)
        self._x = self._batches[0][: given.batch]
        self._repeats = given.repeats
        self._dense = fxfact.for_inference(self._model, self._x)

    def rows(self, share: float) -> list[dict[str, Any]]:
        """Return a row for fxfact and one for uniform Tucker."""
        ours = fxfact.factorize(
            self._model,
            budget=fxfact.Latency(share),
            calibration=self._batches,
            example_inputs=self._x,
        )
        aim = self._faster(ours)
        found = [self._row(f"ours at {share}", ours, aim)]
        low, high, best = 0.0, 1.0, None
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            tucker = fxfact.factorize(self._model, "tucker", rank=middle, example_inputs=self._x)
            network = fxfact.for_inference(tucker, self._x)
            faster = self._faster(network)
            if faster >= aim:
                low, best = middle, (network, faster)
            else:
                high = middle
        if best is None:
            return [*found, {"rule": f"uniform Tucker at {share}", "faster": None}]
        return [*found, self._row(f"uniform Tucker at {share}", *best)]

    def _faster(self, network: nn.Module) -> float:
        calls = [partial(each, self._x) for each in (self._dense, network)]
        dense, own = side_by_side(calls, repeats=self._repeats)
        return dense / own

    def _row(self, rule: str, network: nn.Module, faster: float) -> dict[str, Any]:
        scores, divergences = self._measure(network)
        difference = scores - self._measure.dense
        return {
            "rule": rule, "faster": faster, "score": float(scores.mean()), "difference": float(difference.mean()),
            "±": float(difference.std() / len(difference) ** 0.5), "KL": float(divergences.mean()),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.8, 0.6], help="budgets, as shares of the dense time"
    )
    parser.add_argument("--samples", type=int, default=512, help="number of calibration samples")
    parser.add_argument("--batch", type=int, default=32, help="samples in a call")
    parser.add_argument("--tests", type=int, default=None, help="number of test batches; default: all")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", default="latency_accuracy", help="the name of the JSON file in benchmarks/results")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in given.networks:
        comparison = Comparison(name, given)
        tables[name] = []
        for share in given.shares:
            try:
                tables[name] += comparison.rows(share)
            except fxfact.FxfactError as error:
                tables[name].append({"rule": f"ours at {share}", "refused": str(error)})
            save(given.save, tables)
        show(f"{name}: {TASKS[name].unit}", tables[name], ".4g")


if __name__ == "__main__":
    main()
