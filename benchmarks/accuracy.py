"""Accuracy of every trained network under a budget: fxfact, compared with the classic rank rules.

    python -m benchmarks.accuracy                                          # all networks: many hours on two cores
    python -m benchmarks.accuracy --networks resnet20 --seeds 0 --samples 2048 --units macs           # ten minutes
    python -m benchmarks.accuracy --networks resnet20 --budgets 0.5 0.35 --units macs --distill 300

No labels and no fine-tuning. The calibration samples are not tested. ``difference`` is the difference from the dense
network on the same samples, with its paired standard error. ``KL`` is the mean divergence from the dense network, in
nats for one sample. Both are means over the seeds, with their deviation. ``behind`` says by how many paired standard
errors fxfact is worse than a rule on the same samples, for the worst seed (negative: better). VBMF has no budget, so it
is listed at its own cost, and fxfact at the same cost. Needs the trained weights and data sets (FXFACT_DATA).
"""

from __future__ import annotations

import argparse
import itertools
import statistics as stats
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fxfact
from benchmarks.networks import NETWORKS
from benchmarks.report import save, show
from benchmarks.tasks import TASKS, Task, Tests
from fxfact.calibration import Statistics, split_held_out
from fxfact.calibration.likelihood import resolve_likelihood
from fxfact.conv import KroneckerFisher, KroneckerMoment, from_torch
from fxfact.errors import BudgetError
from fxfact.planning.rank_rules import VBMF, Energy

UNITS = {"macs": fxfact.Macs, "params": fxfact.Params}
OURS = ("ours", "ours, refitted", "ours, distilled")


@dataclass
class Row:
    """The scores and divergences of one network for every test sample."""

    network: str
    unit: str
    share: float
    rule: str
    scores: Tensor
    divergences: Tensor
    seconds: float
    samples: int | None = None
    seed: int | None = None
    predicted: float | None = None


class Measured:
    """Measures scores and divergences of networks on the tests of a dense one."""

    def __init__(self, task: Task, network: nn.Module, most: int | None) -> None:
        tests = task.tests()
        self._tests = Tests(tests.batches[:most], tests.score)
        self._kept = slice(1, None, 2) if task.shared else slice(None)
        self._expected, scores = zip(*self._tests.run(network), strict=True)
        self._likelihood = resolve_likelihood(None, network, tests.batches)
        self.dense = torch.cat(scores)[self._kept].double()

    def __call__(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        scores, divergences = [], []
        for expected, (output, score) in zip(self._expected, self._tests.run(network), strict=True):
            scores.append(score)
            divergences.append(self._likelihood.divergence(expected, output))
        return torch.cat(scores)[self._kept].double(), torch.cat(divergences)[self._kept]


def inputs_alone(statistics: Statistics, model: nn.Module) -> Statistics:
    """Return statistics for the rule that only considers inputs: ‖(W − Ŵ) C^½‖² / ‖W C^½‖².

    Every convolution counts equally. C is the moment of its input patches, for a transposed one that of its inputs.
    """
    moments = {}
    for path, metric in statistics.moments.items():
        spec, output = statistics.specs[path], metric.output.factors[0]
        eye = torch.eye(metric.output.size).expand(output.shape[0], -1, -1).to(output)
        plain = KroneckerFisher(metric.input, KroneckerMoment((eye,)))
        weight = model.get_submodule(path).weight.detach()
        whole = plain.loss_increase(spec, from_torch(spec, weight))
        moments[path] = KroneckerFisher(metric.input, KroneckerMoment((eye / max(whole, 1e-30),)))
    return replace(statistics, moments=moments, samples=sys.maxsize)


def within(model: nn.Module, example: Tensor, budget: Any, rank_at: Callable[[float], object]) -> fxfact.Plan | None:
    """Return the largest plan with Tucker, or SVD for matrices, by bisecting the argument of ``rank_at`` in 0 … 1."""
    low, high, best = 0.0, 1.0, None
    for _ in range(7):
        middle = (low + high) / 2
        plan = fxfact.plan(model, ["tucker", "svd"], rank=rank_at(middle), example_inputs=example)
        if budget.amount(plan.after) <= budget.allowed(plan.network):
            low, best = middle, plan
        else:
            high = middle
    return best


class Trial:
    """Measures one network under all budgets and rules."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        self._name, self._given, self._task = name, given, TASKS[name]
        self._model = NETWORKS[name].load()
        self.measure = Measured(self._task, self._model, given.tests)
        self._example = self._task.batches(1, 0)[0]
        self._vbmf = fxfact.plan(self._model, "tucker", rank=VBMF(), example_inputs=self._example)
        self._network = self._vbmf.network
        budgets = [UNITS[unit](share) for unit in given.units for share in given.budgets]
        self._budgets = [*budgets, fxfact.Macs(at_most=self._vbmf.after.macs)] if given.vbmf else budgets
        self._curves = fxfact.ErrorCurveCache()

    def classic(self) -> Iterator[Row]:
        """Yield rows for the rules that only look at kernels, with Tucker for all layers."""
        if self._given.vbmf:
            yield self._measured(self._budgets[-1], "VBMF", *self._applied(self._vbmf))
        rules: dict[str, Callable[[float], object]] = {"uniform": lambda x: x, "energy": Energy}
        for budget in self._budgets:
            for rule, rank_at in rules.items():
                plan = within(self._model, self._example, budget, rank_at)
                if plan is not None:
                    yield self._measured(budget, rule, *self._applied(plan))

    def on_data(self, samples: int, seed: int) -> Iterator[Row]:
        """Yield rows for the rules that use data: the inputs alone, and fxfact."""
        batches = self._task.batches(samples, seed)
        known: dict[str, Any] = {"samples": sum(map(len, batches)), "seed": seed}
        ours = fxfact.calibrate(self._model, batches, max_samples=None, seed=seed)
        inputs = inputs_alone(ours, self._model)
        seen = split_held_out(batches)[1]  # the batches on which ``factorize`` compares plans
        for budget in self._budgets:
            for rule, statistics, compared in (("inputs", inputs, None), ("ours", ours, seen)):
                started = time.perf_counter()
                plan = self._chosen(budget, statistics, compared)
                if plan is None:
                    continue
                small, _ = self._applied(plan, statistics)
                row = self._measured(budget, rule, small, time.perf_counter() - started)
                yield replace(row, **known, predicted=plan.predicted_loss_increase)
                if rule == "ours":
                    yield from self._better(budget, small, batches, known)

    def _better(self, budget: Any, small: nn.Module, batches: Any, known: dict[str, Any]) -> Iterator[Row]:
        options: dict[str, Any] = {"seed": known["seed"]}
        refitted, refit = fxfact.refit(small, self._model, batches, **options)
        yield replace(self._measured(budget, "ours, refitted", refitted, refit.seconds), **known)
        if self._given.distill:
            best, distillation = fxfact.distill(
                refitted, self._model, batches, steps=10**6, seconds=self._given.distill, **options
            )
            yield replace(self._measured(budget, "ours, distilled", best, distillation.seconds), **known)

    def _chosen(self, budget: Any, statistics: Statistics, compared: Any) -> fxfact.Plan | None:
        options: dict[str, Any] = {
            "calibration": statistics,
            "held_out": compared,
            "example_inputs": self._example,
            "error_curves": self._curves,
        }
        try:
            return fxfact.plan(self._model, self._given.factorizations, budget=budget, **options)
        except BudgetError:
            return None

    def _applied(self, plan: fxfact.Plan, statistics: Statistics | None = None) -> tuple[nn.Module, float]:
        started = time.perf_counter()
        return fxfact.apply(plan, self._model, calibration=statistics), time.perf_counter() - started

    def _measured(self, budget: Any, rule: str, network: nn.Module, seconds: float) -> Row:
        share = round(budget.allowed(self._network) / budget.amount(self._network), 3)
        scores, divergences = self.measure(network)
        row = Row(self._name, budget.unit, share, rule, scores, divergences, seconds)
        print(f"  {rule:16} {share} of the {budget.unit}: {scores.mean():.2f}, KL {divergences.mean():.4f}", flush=True)
        return row


def summary(rows: list[Row], dense: Tensor) -> list[dict[str, Any]]:
    """Return a line for every budget, number of samples and rule, averaged over the seeds."""
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.unit, row.share, row.samples, row.rule), []).append(row)
    found = []
    for (unit, share, samples, rule), group in lines.items():
        scores, divergences = ([float(getattr(row, n).mean()) for row in group] for n in ("scores", "divergences"))
        difference = [float((row.scores - dense).mean()) for row in group]
        others = [r for r in rows if (r.unit, r.share) == (unit, share) and r.rule == "ours"]
        behind = [_behind(mine, row) for row in group for mine in others if _comparable(row, mine)]
        found.append({
            "unit": unit, "share": share, "samples": samples, "rule": rule, "seeds": len(group),
            "score": stats.mean(scores), "± seeds": _spread(scores), "difference": stats.mean(difference),
            "± paired": max(_error(row.scores - dense) for row in group), "KL": stats.mean(divergences),
            "KL ± seeds": _spread(divergences), "behind": max(behind) if behind and rule not in OURS else None,
            "s": stats.mean(row.seconds for row in group),
        })  # fmt: skip
    return sorted(found, key=lambda line: (line["unit"], -line["share"], line["samples"] or 0))


def _comparable(row: Row, mine: Row) -> bool:
    """Return whether both rows used the same data, or the first one used none."""
    return row.seed is None or (row.seed, row.samples) == (mine.seed, mine.samples)


def _behind(mine: Row, other: Row) -> float:
    difference = other.scores - mine.scores
    return float(difference.mean()) / max(_error(difference), 1e-9)


def _error(difference: Tensor) -> float:
    return float(difference.std() / len(difference) ** 0.5)


def _spread(values: list[float]) -> float | None:
    return stats.stdev(values) if len(values) > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5, 0.35, 0.2], help="as shares")
    parser.add_argument("--units", nargs="+", choices=list(UNITS), default=list(UNITS))
    parser.add_argument("--samples", type=int, nargs="+", default=[512, 2048], help="numbers of calibration samples")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--factorizations", nargs="+", default=None, help="default: all of them")
    parser.add_argument("--vbmf", action=argparse.BooleanOptionalAction, default=True, help="also at VBMF's cost")
    parser.add_argument("--distill", type=float, default=0, help="seconds of distillation")
    parser.add_argument("--tests", type=int, default=None, help="number of test batches; default: all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", default="accuracy", help="the name of the JSON file in benchmarks/results")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tables: dict[str, Any] = {}
    for name in given.networks:
        trial = Trial(name, given)
        dense, rows = trial.measure.dense, list(trial.classic())
        for samples, seed in itertools.product(given.samples, given.seeds):
            rows += trial.on_data(samples, seed)
            tables[name] = {"dense": float(dense.mean()), "tests": len(dense), "rows": summary(rows, dense)}
            save(given.save, tables)  # after every seed, because a run takes hours and may be stopped
        show(f"{name}: {TASKS[name].unit}, dense {dense.mean():.2f} on {len(dense)} tests", tables[name]["rows"], ".4g")


if __name__ == "__main__":
    main()
