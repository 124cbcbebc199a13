"""The predicted loss increase compared with the measured one, over convolutions, factorizations and ranks.

    python -m benchmarks.prediction                       # all networks: half an hour on two cores
    python -m benchmarks.prediction --networks resnet20 --plot scatter.png

One convolution at a time is factorized. Its measured increase is the mean KL divergence from the dense network, on
samples that were not used for calibration. Printed are Spearman's rank correlation, and the ratio of the measured to
the predicted increase (median and quartiles). Needs the trained weights and data sets (FXFACT_DATA).
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import nn

import fxfact
from benchmarks.accuracy import Measured
from benchmarks.networks import NETWORKS
from benchmarks.report import save, show
from benchmarks.tasks import TASKS
from fxfact.calibration import Statistics
from fxfact.conv import ConvLayer, compose, read_conv, to_torch
from fxfact.factorizations import FACTORIZATIONS
from fxfact.graph import with_kernels
from fxfact.utils import alias_copy


def pairs_of(model: nn.Module, statistics: Statistics, measure: Measured, count: int) -> list[dict[str, Any]]:
    """Return predicted and measured nats of ``count`` rewrites, with random factorizations and ranks."""
    draw, found = np.random.default_rng(0), []
    layers = {path: read_conv(model.get_submodule(path)) for path in statistics.moments}
    layers = {path: layer for path, layer in layers.items() if any(not k().rejects(layer.spec) for k in FACTORIZATIONS)}
    while len(found) < count:
        path = list(layers)[len(found) % len(layers)]
        layer, kind = layers[path], FACTORIZATIONS[int(draw.integers(len(FACTORIZATIONS)))]()
        assert isinstance(layer, ConvLayer)
        if kind.rejects(layer.spec):
            continue
        rank = kind.rank_within(layer.spec, draw.uniform(0.1, 0.9)) or kind.smallest_rank(layer.spec)
        metric = statistics.fisher(path, layer.spec)
        assert metric is not None
        kernel = compose(kind.decompose(layer, rank, metric=metric))
        changed = with_kernels(alias_copy(model), {path: to_torch(layer.spec, kernel)})
        _, divergences = measure(changed)
        predicted = metric.loss_increase(layer.spec, kernel - layer.weight.detach())
        found.append({"path": path, "factorization": kind.name, "rank": rank, "predicted": predicted,
                      "measured": float(divergences.mean())})  # fmt: skip
    return found


def spearman(first: list[float], second: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--pairs", type=int, default=100, help="number of rewrites for each network")
    parser.add_argument("--samples", type=int, default=2048, help="number of calibration samples")
    parser.add_argument("--tests", type=int, default=2, help="number of test batches (250 samples each for CIFAR-10)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plot", help="write a scatter plot to this file (needs matplotlib: the extra [plot])")
    parser.add_argument("--save", default="prediction", help="the name of the JSON file in benchmarks/results")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows, scatter = [], {}
    for name in given.networks:
        task, model = TASKS[name], NETWORKS[name].load()
        statistics = fxfact.calibrate(model, task.batches(given.samples, 0), max_samples=None)
        found = pairs_of(model, statistics, Measured(task, model, given.tests), given.pairs)
        predicted, measured = ([max(pair[key], 1e-12) for pair in found] for key in ("predicted", "measured"))
        low, middle, high = np.quantile(np.array(measured) / predicted, [0.25, 0.5, 0.75])
        rows.append({"network": name, "pairs": len(found), "rank correlation": spearman(predicted, measured),
                     "measured / predicted": middle, "lower quartile": low, "upper quartile": high})  # fmt: skip
        print(rows[-1], flush=True)
        scatter[name] = found
        save(given.save, {"rows": rows, "scatter": scatter})
    show("measured loss increase, compared with the predicted one", rows)
    if given.plot:
        plot(scatter, given.plot)


def plot(scatter: dict[str, list[dict[str, Any]]], path: str) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)

    figure = Figure(figsize=(12, 12), layout="constrained")
    columns = int(np.ceil(len(scatter) ** 0.5))
    for k, (name, found) in enumerate(scatter.items(), start=1):
        axes = figure.add_subplot(columns, columns, k)
        axes.loglog([pair["predicted"] for pair in found], [pair["measured"] for pair in found], ".")
        axes.set(title=name, xlabel="predicted (nats)", ylabel="measured (nats)")
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main()
