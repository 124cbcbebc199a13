"""How much of the accuracy that a budget cost refitting and a short distillation bring back, without labels.

    python -m benchmarks.distillation                                              # half an hour on two cores
    python -m benchmarks.distillation --shares 0.321 --seconds 900 --samples 7994  # to compare with ALDS

The ranks are chosen on the samples that are learned from, not on those tested. Images are flipped and shifted at random
by up to four pixels, and mixed (mixup), because the networks were trained on these samples. For ResNet-20 on CIFAR-10,
ALDS (Liebenwein et al. 2021) reports 67.9 % fewer MACs at 0.47 points less, after complete retraining on all 50,000
images with their labels. Needs the trained weights and data sets (FXFACT_DATA).
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfact
from benchmarks.accuracy import Measured
from benchmarks.networks import NETWORKS
from benchmarks.report import save, show
from benchmarks.tasks import TASKS


def flip_and_shift(images: Tensor, draw: torch.Generator) -> Tensor:
    """Flip each image at random, and shift it by up to four pixels in both directions, filling with zeros."""
    count, _, height, width = images.shape
    mirror = torch.rand(count, generator=draw) < 0.5
    images = torch.where(mirror[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (4, 4, 4, 4))
    down, right = torch.randint(9, (2, count), generator=draw)
    rows = down[:, None] + torch.arange(height)
    columns = right[:, None] + torch.arange(width)
    picked = torch.arange(count)[:, None, None]
    return padded[picked, :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def rows_of(name: str, share: float, given: argparse.Namespace) -> list[dict[str, Any]]:
    task, model = TASKS[name], NETWORKS[name].load()
    measure, batches = Measured(task, model, None), task.batches(given.samples, given.seed, 128)
    example = batches[0][:1]
    data: dict[str, Any] = {"calibration": batches, "max_samples": None, "example_inputs": example}
    small = fxfact.factorize(model, budget=fxfact.Macs(share), **data)
    plan = fxfact.plan_of(small)
    options: dict[str, Any] = {"seed": given.seed}
    refitted, refit = fxfact.refit(small, model, batches, **options)
    augment = (
        partial(flip_and_shift, draw=torch.Generator().manual_seed(given.seed))
        if given.augment and batches[0].ndim == 4
        else None
    )
    distilled, distillation = fxfact.distill(
        refitted, model, batches, steps=10**6, seconds=given.seconds, lr=given.lr, augment=augment, patience=10**6,
        mixup=given.mixup, **options,
    )  # fmt: skip
    states: list[tuple[str, nn.Module, float, int]] = [
        ("ours", small, 0.0, 0),
        ("refitted", refitted, refit.seconds, 0),
        ("distilled", distilled, distillation.seconds, distillation.steps),
    ]
    found = []
    for what, network, seconds, steps in states:
        scores, divergences = measure(network)
        difference = scores - measure.dense
        found.append({
            "network": name, "MACs": plan.after.macs / plan.network.macs,
            "params": plan.after.params / plan.network.params, "what": what,
            "score": float(scores.mean()), "difference": float(difference.mean()),
            "± paired": float(difference.std() / len(difference) ** 0.5), "KL": float(divergences.mean()),
            "s": seconds, "steps": steps,
        })  # fmt: skip
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(TASKS), default=["resnet20"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.35], help="budgets, as shares of the MACs")
    parser.add_argument("--seconds", type=float, default=300, help="of distillation")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--mixup", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", default="distillation", help="the name of the JSON file in benchmarks/results")
    given = parser.parse_args()
    rows = [row for name in given.networks for share in given.shares for row in rows_of(name, share, given)]
    show("refitted and distilled without labels", rows, ".4g")
    save(given.save, {"seconds": given.seconds, "samples": given.samples, "rows": rows})


if __name__ == "__main__":
    main()
