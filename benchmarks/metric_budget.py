"""Budgets in the unit of a metric: the cost that is reached, the drop on other samples, and how often the bound held.

    python -m benchmarks.metric_budget                       # an hour on two cores
    python -m benchmarks.metric_budget --networks digits     # a few minutes

Every run draws a random half of the tests for ``evaluate`` and looks at the drop on the other half. ``scores`` are runs
with one score for each sample, whose bound is meant to hold for other samples, and ``number`` are runs with their mean.
``held`` is the share of runs in which the drop on the other half was within the bound. Runs of a network share its
statistics, and its networks on a grid of costs, each of which is made and scored on all tests once. The last line of a
network is one call of ``fxfact.factorize`` without any of this. Needs the trained weights and data sets (FXFACT_DATA).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxfact
from benchmarks.networks import NETWORKS
from benchmarks.report import save, show
from benchmarks.tasks import TASKS, arrays, psnr
from fxfact.calibration import split_held_out
from fxfact.cli.demo import DigitNet, load_digits, train
from fxfact.errors import BudgetError
from fxfact.search.cheapest import CostOfIncrease, Limit, cheapest_within
from fxfact.search.metric_drop import check_enough_scores, largest_drop

_STEP = 0.02  # of the dense cost, between two networks of the grid
_PATCHES = 10  # of every image to denoise
_PATCH = 64  # pixels on each side


@dataclass(frozen=True)
class Case:
    """A trained network, a function that scores every test, calibration batches, and the bounds on the drop."""

    network: nn.Module
    scores: Callable[[nn.Module], Tensor]
    batches: tuple[Tensor, ...]
    bounds: tuple[float, ...]


def task_case(name: str, samples: int) -> Case:
    task = TASKS[name]
    tests = task.tests()
    return Case(
        NETWORKS[name].load(),
        lambda network: torch.cat([scores for _, scores in tests.run(network)]).double(),
        task.batches(samples, 0),
        (0.5, 1.0, 3.0),
    )


def dncnn_case(samples: int) -> Case:
    """Return DnCNN with random patches of Set12, because twelve images are few samples."""
    generator, images, clean = torch.Generator().manual_seed(0), arrays("set12"), []
    for name in sorted(images.files):
        image = torch.from_numpy(images[name]).float() / 255
        for _ in range(_PATCHES):
            top, left = (int(torch.randint(side - _PATCH + 1, (), generator=generator)) for side in image.shape)
            clean.append(image[top : top + _PATCH, left : left + _PATCH])
    truth = torch.stack(clean)[:, None]
    noisy = truth + 25 / 255 * torch.randn(truth.shape, generator=generator)

    def scores(network: nn.Module) -> Tensor:
        with torch.inference_mode():
            found = torch.cat([(part - network(part)).clamp(0, 1) for part in noisy.split(20)])
        return torch.cat([psnr(one, other, 1) for one, other in zip(found, truth, strict=True)]).double()

    return Case(NETWORKS["dncnn"].load(), scores, TASKS["dncnn"].batches(samples, 0), (0.1, 0.3))


def digits_case(samples: int) -> Case:
    digits, network = load_digits(0), DigitNet()
    train(network, digits, epochs=10, print_progress=lambda text: None)
    images, labels = digits.test

    def scores(network: nn.Module) -> Tensor:
        with torch.inference_mode():
            return 100.0 * (network(images).argmax(1) == labels).double()

    return Case(network, scores, digits.train[0][:samples].split(64), (0.5, 1.0, 3.0))


CASES: dict[str, Callable[[int], Case]] = {
    "resnet20": lambda samples: task_case("resnet20", samples),
    "wide_resnet8": lambda samples: task_case("wide_resnet8", samples),
    "dncnn": dncnn_case,
    "digits": digits_case,
}


class Grid:
    """The networks of a case on a grid of costs, each made and scored when it is needed first."""

    def __init__(self, case: Case, factorizations: Any) -> None:
        self._case, self._factorizations, self._scores = case, factorizations, {}
        self._statistics = fxfact.calibrate(case.network, case.batches, max_samples=None)
        self._seen = split_held_out(case.batches)[1]  # the batches on which ``factorize`` compares plans
        self._curves, self._plans = fxfact.ErrorCurveCache(), {}
        whole = self._plan(fxfact.Macs(1.0))
        self.front = CostOfIncrease(whole.pareto_points, whole.network, fxfact.Macs)
        self._least = self.front.share(self.front.ends[1])
        self.dense = case.scores(case.network)

    def plan_at(self, share: float) -> fxfact.Plan:
        """Return the plan of the grid that is next to a share of the MACs."""
        nearest = min(max(round(share / _STEP) * _STEP, self._least * (1 + 1e-9)), 1.0)
        if nearest not in self._plans:
            self._plans[nearest] = self._plan(fxfact.Macs(nearest))
        return self._plans[nearest]

    def scores(self, plan: fxfact.Plan) -> Tensor:
        """Return the scores of a plan's network on all tests."""
        key = frozenset(decision.rewrite for decision in plan.rewrites)
        if key not in self._scores:
            network = fxfact.apply(plan, self._case.network, calibration=self._statistics) if key else None
            self._scores[key] = self.dense if network is None else self._case.scores(network)
            share, score = plan.after.macs / plan.network.macs, self._scores[key].mean()
            print(f"  {share:.2f} of the MACs: {score:.2f} of {self.dense.mean():.2f}", flush=True)
        return self._scores[key]

    def _plan(self, budget: fxfact.Macs) -> fxfact.Plan:
        options: dict[str, Any] = {"held_out": self._seen, "error_curves": self._curves}
        return fxfact.plan(
            self._case.network,
            self._factorizations,
            budget=budget,
            calibration=self._statistics,
            example_inputs=self._case.batches[0],
            **options,
        )


def halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the tests of two random halves."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count // 2], order[count // 2 :]


def run(grid: Grid, bound: float, seed: int, *, as_number: bool) -> dict[str, float]:
    """Search for the cheapest network within the bound on one half, and measure its drop on the other."""
    mine, others = halves(len(grid.dense), seed)
    measured: dict[frozenset[str], float] = {}

    def evaluate(plan: fxfact.Plan | None) -> Tensor:
        scores = (grid.dense if plan is None else grid.scores(plan))[mine]
        return scores.mean()[None] if as_number else scores

    def measure(plan: fxfact.Plan) -> float:
        rewrites = frozenset(decision.rewrite for decision in plan.rewrites)
        measured[rewrites] = largest_drop(metric, evaluate(None), evaluate(plan))
        return measured[rewrites] if rewrites else 0.0

    metric = fxfact.Metric(evaluate, at_most_drop=bound)
    check_enough_scores(metric, evaluate(None))
    limit = Limit(measure, bound, metric.evaluations - 2, slope=0.5, subject="metric")
    plan = cheapest_within(limit, grid.front, grid.plan_at)
    share = 1.0 if plan is None else plan.after.macs / plan.network.macs
    drops = grid.dense - grid.dense if plan is None else grid.dense - grid.scores(plan)
    return {"share": share, "drop": float(drops[others].mean()), "evaluations": 2 + len(measured)}


def summary(grid: Grid, bound: float, runs: int, *, as_number: bool) -> dict[str, Any]:
    """Return a line of the table: all runs of one bound."""
    line: dict[str, Any] = {"at_most_drop": bound, "evaluate returns": "number" if as_number else "scores"}
    try:
        found = [run(grid, bound, seed, as_number=as_number) for seed in range(runs)]
    except BudgetError as error:
        print(f"  {error}", flush=True)
        return {**line, "remark": "too few samples"}
    shares, drops = sorted(one["share"] for one in found), sorted(one["drop"] for one in found)
    return {
        **line,
        "runs": runs,
        "MACs, median": shares[runs // 2],
        "least": shares[0],
        "most": shares[-1],
        "drop on others, median": drops[runs // 2],
        "largest": drops[-1],
        "held, %": 100 * sum(drop <= bound for drop in drops) / runs,
        "evaluations": sum(one["evaluations"] for one in found) / runs,
    }


def one_call(case: Case, bound: float, factorizations: Any) -> dict[str, Any]:
    """Return the line of one call of ``fxfact.factorize``."""
    dense = case.scores(case.network)
    mine, others = halves(len(dense), 0)
    metric = fxfact.Metric(lambda network: case.scores(network)[mine], at_most_drop=bound)
    started = time.perf_counter()
    small = fxfact.factorize(case.network, factorizations, budget=metric, calibration=case.batches, max_samples=None)
    plan, drop = fxfact.plan_of(small), float((dense - case.scores(small))[others].mean())
    return {
        "at_most_drop": bound,
        "evaluate returns": "scores",
        "runs": 1,
        "MACs, median": plan.after.macs / plan.network.macs,
        "drop on others, median": drop,
        "held, %": 100.0 * (drop <= bound),
        "evaluations": 1 + len(plan.measured_points),
        "remark": f"one call, {time.perf_counter() - started:.0f} s",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--samples", type=int, default=1024, help="number of calibration samples")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--factorizations", nargs="+", default=None, help="default: all of them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", default="metric_budget", help="the name of the JSON file in benchmarks/results")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tables: dict[str, Any] = {}
    for name in given.networks:
        case = CASES[name](given.samples)
        grid = Grid(case, given.factorizations)
        rows = [summary(grid, bound, given.runs, as_number=kind) for kind in (False, True) for bound in case.bounds]
        rows.append(one_call(case, case.bounds[-1], given.factorizations))
        tables[name] = {"dense": float(grid.dense.mean()), "tests": len(grid.dense), "rows": rows}
        save(given.save, tables)
        show(f"{name}: dense {grid.dense.mean():.2f} on {len(grid.dense)} tests", rows)


if __name__ == "__main__":
    main()
