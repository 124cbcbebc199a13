"""What a budget costs every trained network at its task: ranks by what the loss can bear, against the classic rules.

    python -m benchmarks.accuracy                                          # all networks: hours on two cores
    python -m benchmarks.accuracy --networks resnet20 --budgets 0.7 0.5    # ten minutes
    python -m benchmarks.accuracy --networks wide_resnet8 --budgets 0.5 --recover 300

No labels, no fine-tuning; the samples calibrated on are not those tested. ``difference`` is from the dense network, on
the same samples, with its paired standard error; ``KL`` the mean divergence from it. VBMF has no budget: it is listed
at its own cost, and ours at the same. Needs the trained weights and data sets (FXFACT_DATA).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fxfact
from benchmarks.networks import NETWORKS
from benchmarks.report import save, show
from benchmarks.tasks import TASKS, Task
from fxfact.calibration import Statistics, dense_of, likelihood_for
from fxfact.metric import Metric, Moment
from fxfact.ranks import VBMF, Energy

UNITS = {"macs": fxfact.Macs, "params": fxfact.Params}


class Measured:
    """The dense network on its tests, and how far others are from it."""

    def __init__(self, task: Task, network: nn.Module) -> None:
        self._tests, self._kept = task.tests(), slice(1, None, 2) if task.shared else slice(None)
        self._expected, scores = zip(*self._tests.run(network), strict=True)
        self._likelihood = likelihood_for(task.likelihood, self._expected[0])
        self._variance = float(torch.cat([t.flatten() for y in self._expected for t in dense_of(y)]).var())
        self._scores = torch.cat(scores)[self._kept].double()

    def __call__(self, network: nn.Module) -> dict[str, float]:
        found, scores, divergences = self._tests.run(network), [], []
        for expected, (output, score) in zip(self._expected, found, strict=True):
            scores.append(score)
            divergences.append(self._likelihood.divergence(expected, output, self._variance))
        score = torch.cat(scores)[self._kept].double()
        difference = score - self._scores
        return {
            "score": float(score.mean()),
            "difference": float(difference.mean()),
            "error": float(difference.std() / len(difference) ** 0.5),
            "KL": float(torch.cat(divergences)[self._kept].mean()),
        }


def inputs_alone(statistics: Statistics, model: nn.Module) -> Statistics:
    """The data-aware rule that looks at inputs only: ‖(W − Ŵ) C^½‖² / ‖W C^½‖², every convolution counted alike."""
    moments = {}
    for path, metric in statistics.moments.items():
        spec, output = statistics.specs[path], metric.output.factors[0]
        eye = torch.eye(metric.output.size).expand(output.shape[0], -1, -1).to(output)
        plain = Metric(metric.input, Moment((eye,)))
        whole = plain.increase(spec, model.get_submodule(path).weight.detach())
        moments[path] = Metric(metric.input, Moment((eye / max(whole, 1e-30),)))
    return replace(statistics, moments=moments, curves={})


def within(model: nn.Module, example: Tensor, budget: Any, rank_at: Callable[[float], object]) -> fxfact.Plan | None:
    """The largest Tucker plan under a budget of those whose ranks grow with a number in 0 … 1, found by halving."""
    low, high, best = 0.0, 1.0, None
    for _ in range(7):
        middle = (low + high) / 2
        plan = fxfact.plan(model, "tucker", rank=rank_at(middle), example_inputs=example)
        if budget.amount(plan.after) <= budget.allowed(plan.network):
            low, best = middle, plan
        else:
            high = middle
    return best


def plans(
    model: nn.Module, example: Tensor, budget: Any, ours: Statistics, inputs: Statistics, kinds: list[str] | None
) -> dict[str, tuple[fxfact.Plan | None, Statistics | None]]:
    """For every rule its plan under a budget, and the statistics to carry it out with."""

    def chosen(statistics: Statistics) -> fxfact.Plan | None:
        try:
            return fxfact.plan(model, kinds, budget=budget, example_inputs=example, calibration=statistics)
        except fxfact.BudgetError:
            return None

    return {
        "uniform Tucker": (within(model, example, budget, lambda x: max(x, 1e-6)), None),
        "energy": (within(model, example, budget, lambda x: Energy(max(x, 1e-6))), None),
        "inputs alone": (chosen(inputs), inputs),
        "ours": (chosen(ours), ours),
    }


def rows_of(name: str, samples: int, seed: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every budget and rule."""
    task, model = TASKS[name], NETWORKS[name].load()
    measure, batches = Measured(task, model), task.batches(samples, seed)
    started = time.perf_counter()
    statistics = fxfact.calibrate(model, batches, likelihood=task.likelihood, seed=seed)
    print(f"{name}: calibrated on {statistics.samples} samples in {time.perf_counter() - started:.1f} s", flush=True)
    inputs, example = inputs_alone(statistics, model), batches[0][:1]
    budgets = [(unit, UNITS[unit](share)) for unit in given.units for share in given.budgets]
    vbmf = fxfact.plan(model, "tucker", rank=VBMF(), example_inputs=example)
    at_vbmf = fxfact.Macs(at_most=vbmf.after.macs)
    found = []
    for unit, budget in [*budgets, ("macs", at_vbmf)]:
        rules = plans(model, example, budget, statistics, inputs, given.factorizations)
        for rule, (plan, own) in (rules if budget is not at_vbmf else {"VBMF": (vbmf, None), **rules}).items():
            row = {"network": name, "samples": statistics.samples, "seed": seed, "unit": unit, "rule": rule}
            row["share"] = round(budget.allowed(vbmf.network) / budget.amount(vbmf.network), 3)
            if plan is None:
                found.append(row)
                continue
            started = time.perf_counter()
            small = fxfact.apply(plan, model, statistics=own)
            found.append(row | measure(small) | {"predicted": plan.increase, "s": time.perf_counter() - started})
            print(found[-1], flush=True)
            if rule == "ours" and given.recover:
                recovered, report = fxfact.recover(
                    small, model, batches, steps=10**6, seconds=given.recover, likelihood=task.likelihood, seed=seed
                )
                found.append(row | measure(recovered) | {"rule": "ours, recovered", "s": report.seconds})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5, 0.35, 0.2], help="shares")
    parser.add_argument("--units", nargs="+", choices=list(UNITS), default=list(UNITS))
    parser.add_argument("--samples", type=int, nargs="+", default=[512, 2048], help="to calibrate on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--factorizations", nargs="+", default=None, help="default: all, mixed")
    parser.add_argument("--recover", type=float, default=0, help="seconds of distillation")
    parser.add_argument("--save", default="accuracy", help="the name of the JSON file in benchmarks/results")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in given.networks:
        mine = [row for samples in given.samples for seed in given.seeds for row in rows_of(name, samples, seed, given)]
        rows += mine
        show(f"{name}: {TASKS[name].unit}, dense {TASKS[name].dense:.2f} on all tests", mine, ".4g")
        save(given.save, {"rows": rows})


if __name__ == "__main__":
    main()
