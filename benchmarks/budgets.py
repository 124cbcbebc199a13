"""What a budget costs a trained CIFAR-10 network whose ranks are chosen by what the loss can bear.

    python -m benchmarks.budgets                    # ResNet-20, about ten minutes on two cores
    python -m benchmarks.budgets --networks wide_resnet8 --budgets 0.7 0.5 0.35 --recover 300

Calibrated on unlabelled training images, measured on the test images. Needs weights and data (FXFACT_DATA).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

import fxfact
from benchmarks.networks import NETWORKS
from benchmarks.report import save, show
from benchmarks.tasks import TASKS, cifar10_images, outputs

CIFAR = ("resnet20", "resnet56", "wide_resnet8")


def divergence(network: nn.Module, inputs: Tensor, expected: Tensor) -> float:
    """Mean KL from the original's logits, in nats for one image."""
    found = torch.cat(list(outputs(network, inputs)))
    return float(F.kl_div(F.log_softmax(found, 1), F.log_softmax(expected, 1), reduction="batchmean", log_target=True))


def flipped_and_shifted(generator: torch.Generator) -> Any:
    def augment(images: Tensor) -> Tensor:
        flip = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        down, right = torch.randint(0, 9, (2,), generator=generator).tolist()
        padded = F.pad(torch.where(flip, images.flip(3), images), (4, 4, 4, 4))
        return padded[..., down : down + images.shape[2], right : right + images.shape[3]]

    return augment


def measure(name: str, given: argparse.Namespace) -> tuple[list[dict[str, Any]], float]:
    model, task, normalised = NETWORKS[name].load(), TASKS[name], name != "wide_resnet8"
    images, _ = cifar10_images("cifar10_train", normalised=normalised)
    batches = images[: given.images].split(128)
    tested, _ = cifar10_images("cifar10_test_a", normalised=normalised)
    expected = torch.cat(list(outputs(model, tested)))
    started = time.perf_counter()
    statistics = fxfact.calibrate(model, batches, seed=given.seed)
    calibrated, rows = time.perf_counter() - started, []
    pairs: list[tuple[float, float]] = []
    for budget in given.budgets:
        started = time.perf_counter()
        options = {"example_inputs": images[:1], "calibration": statistics}
        plan = fxfact.plan(model, given.factorizations, budget=fxfact.Macs(budget), **options)
        planned = time.perf_counter() - started
        small = fxfact.apply(plan, model, statistics=statistics)
        row = {
            "network": name,
            "MACs": budget,
            "dense": task.dense,
            "ours": task.figure(small),
            "KL": divergence(small, tested, expected),
            "predicted": plan.increase,
            "calibrate s": calibrated,
            "plan s": planned,
        }
        for decision in plan.rewrites:  # each alone
            alone = plan
            for other in plan.rewrites:
                alone = alone if other.path == decision.path else alone.edited(other.path, skip="alone")
            network = fxfact.apply(alone, model, statistics=statistics)
            pairs.append((decision.increase or 0.0, divergence(network, tested[:1000], expected[:1000])))
        if given.recover:
            augment = flipped_and_shifted(torch.Generator().manual_seed(given.seed))
            recovered, report = fxfact.recover(
                small, model, batches, steps=10**6, seconds=given.recover, augment=augment, seed=given.seed
            )
            row |= {"recovered": task.figure(recovered), "recover s": report.seconds}
        rows.append(row)
    correlation = float(spearmanr(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 else float("nan")
    return rows, correlation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=CIFAR, default=["resnet20"])
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5, 0.35], help="shares of the MACs"
    )
    parser.add_argument("--factorizations", nargs="+", default=None, help="default: all")
    parser.add_argument("--images", type=int, default=2048, help="to calibrate on")
    parser.add_argument("--recover", type=float, default=0, help="seconds of distillation")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    content: dict[str, Any] = {}
    for name in given.networks:
        rows, correlation = measure(name, given)
        show(
            f"{name}, {given.images} images; predicted and measured: rank correlation {correlation:.3f}",
            rows,
        )
        content[name] = {"rows": rows, "rank correlation": correlation}
    save("budgets", content)


if __name__ == "__main__":
    main()
