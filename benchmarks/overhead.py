"""Overhead of the graph: a factorized network compared with the same stages written by hand as ``nn.Sequential``.

    python -m benchmarks.overhead             # about a minute on two cores

For every factorization: the largest and the smallest 3×3 layer of ResNet-18 at its input size for 224² images, and the
whole of ResNet-18, where each convolution of the module tree is replaced by an ``nn.Sequential`` of the stages. Both
run in turns in one process. The ratio is that of the medians, with that of the minima beside it.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import Tensor, nn

import fxfact
from benchmarks.networks import NETWORKS
from benchmarks.report import in_turns, median, save, show
from fxfact.factorizations import FACTORIZATIONS, CPFactorized, Factorization
from fxfact.factorizations.cp import CPMobilenet

LAYERS = {"64→64 at 56²": (64, 64, 56), "512→512 at 7²": (512, 512, 7)}


def by_hand(model: nn.Module, factorized: nn.Module) -> nn.Module:
    """Return the model with the stages in its own modules, without a graph."""
    result = copy.deepcopy(model)
    for decision in fxfact.plan_of(factorized).rewrites:
        parent, _, name = decision.path.rpartition(".")
        stages = nn.Sequential(*copy.deepcopy(list(factorized.get_submodule(decision.path).children())))
        setattr(result.get_submodule(parent), name, stages)
    return result


def compare(name: str, model: nn.Module, x: Tensor, factorization: Factorization, repeats: int) -> dict[str, Any]:
    graph = fxfact.factorize(model, factorization, rank=0.5)
    hand = by_hand(model, graph)
    with torch.inference_mode():
        assert torch.equal(graph(x), hand(x))
        seconds = in_turns({"graph": lambda: graph(x), "by hand": lambda: hand(x)}, repeats)
    return {
        "network": name,
        "factorization": factorization.name,
        "graph ms": 1e3 * median(seconds["graph"]),
        "by hand ms": 1e3 * median(seconds["by hand"]),
        "ratio": median(seconds["graph"]) / median(seconds["by hand"]),
        "ratio of minima": min(seconds["graph"]) / min(seconds["by hand"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=500, help="turns for a layer; a quarter of them for the network")
    given = parser.parse_args()
    rows = []
    for kind in FACTORIZATIONS:
        method = kind(sweeps=2) if kind in (CPFactorized, CPMobilenet) else kind()  # type: ignore[call-arg]
        for name, (into, out, size) in LAYERS.items():
            conv = nn.Sequential(nn.Conv2d(into, out, 1 if method.name == "svd" else 3, padding=1)).eval()
            rows.append(compare(name, conv, torch.randn(1, into, size, size), method, given.repeats))
        if method.name != "svd":
            resnet, x = NETWORKS["resnet18"].load(), torch.randn(1, 3, 224, 224)
            rows.append(compare("resnet18", resnet, x, method, given.repeats // 4))
    show("A factorized network against the same stages by hand", rows, ".4g")
    ratios = [row["ratio"] for row in rows]
    print(f"\nratio: median {median(ratios):.3f}, largest {max(ratios):.3f}")
    save("overhead", {"rows": rows})


if __name__ == "__main__":
    main()
