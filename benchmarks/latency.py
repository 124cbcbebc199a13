"""Speed of networks in their fastest forms: dense, from fxfact, and from other methods.

    python -m benchmarks.latency                                                # hours on two cores
    python -m benchmarks.latency --networks resnet18 --batches 1 --threads 1    # some minutes
    python -m benchmarks.latency --networks resnet18 --batches 1 --compiled     # inductor with freezing as well
    python -m benchmarks.latency --networks resnet18 --batches 256 --compiled --device cuda --dtype bfloat16

Weights are random and there is no data, because times do not depend on them. All networks run in turns. ``faster`` is
the median over the turns of the dense network's time divided by that of the network, each in its fastest form; ``±`` is
the larger of the two spreads (half of the interquartile range, relative); ``fastest`` is the ratio of the minima;
``efficiency`` is ``faster`` divided by ``fewer MACs``; ``predicted`` is the planned share of the dense time divided by
the measured one; ``loss`` is the sum of the squared relative errors of the kernels. Uniform rules use one factorization
and one fraction for all layers, at the MACs of fxfact's result. TensorLy-Torch's layers are measured if it is installed
(pip install --no-deps tensorly-torch).
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from statistics import geometric_mean, median, quantiles
from typing import Any

import torch
from torch import nn

import fxfact
from benchmarks.report import save, show
from benchmarks.untrained import TIMED
from fxfact.utils import milliseconds

_TENSORLY_TORCH = "TensorLy-Torch"
_WARM_UP = 3  # calls before CUDA graphs are recorded


class Comparison:
    """One network at one batch size: the forms of the dense network and of its replacements."""

    def __init__(self, name: str, batch: int, given: argparse.Namespace) -> None:
        self._given = given
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            like = {"device": given.device, "dtype": getattr(torch, given.dtype)}
            self.model = TIMED[name].build().eval().to(**like)
            self.x = torch.randn(batch, *TIMED[name].input_shape).to(**like)
        self.forms: dict[str, list[nn.Module]] = {"dense": self._forms(self.model)}
        self.facts: dict[str, dict[str, Any]] = {"dense": {}}

    def add(self, rule: str, network: nn.Module, plan: fxfact.Plan | None, seconds: float) -> None:
        """Add a network to be timed. Its plan has its cost."""
        self.forms[rule] = [network] if plan is not None and plan.inference_passes else self._forms(network)
        if self._given.compiled:
            self.forms[rule] = self._compiled(self.forms[rule])
        facts: dict[str, Any] = {"s": seconds}
        if plan is not None:
            assert plan.network.macs
            assert plan.after.macs
            facts |= {"fewer MACs": plan.network.macs / plan.after.macs, "loss": _loss(network)}
            if plan.after.ms is not None and plan.network.ms is not None:
                facts |= {"predicted": plan.after.ms / plan.network.ms}
        self.facts[rule] = facts

    def rows(self) -> list[dict[str, Any]]:
        """Time all networks in turns, and return a row for each rule."""
        names = [(rule, network) for rule, networks in self.forms.items() for network in networks]
        calls: list[Callable[[], object]] = [partial(network, self.x) for _, network in names]
        times = milliseconds(calls, repeats=self._given.repeats)
        best: dict[str, list[float]] = {}
        for (rule, _), own in zip(names, times, strict=True):
            best[rule] = min(best.get(rule, own), own, key=median)
        dense = best["dense"]
        rows = []
        for rule, own in best.items():
            facts = self.facts[rule]
            faster = median(d / o for d, o in zip(dense, own, strict=True))
            fastest = min(dense) / min(own)
            fewer, predicted = facts.get("fewer MACs"), facts.get("predicted")
            rows.append({
                "rule": rule, "ms": median(own), "faster": faster, "±": max(_spread(dense), _spread(own)),
                "fastest": fastest, "fewer MACs": fewer, "efficiency": faster / fewer if fewer else None,
                "predicted": predicted * faster if predicted else None, "loss": facts.get("loss"),
                "s": facts.get("s"),
            })  # fmt: skip
        return rows

    def _forms(self, network: nn.Module) -> list[nn.Module]:
        last = copy.deepcopy(network).to(memory_format=torch.channels_last) if self.x.ndim == 4 else network
        forms = [network, last, fxfact.for_inference(network, self.x)]
        return self._compiled(forms) if self._given.compiled and network is self.model else forms

    def _compiled(self, forms: list[nn.Module]) -> list[nn.Module]:
        """Add forms compiled by inductor with frozen weights: called from Python and C++, or as CUDA graphs."""
        torch._dynamo.config.recompile_limit = 1000  # every network is compiled once, and many share their classes
        on_cpu = self._given.device == "cpu"
        ways = [{"cpp_wrapper": False}, {"cpp_wrapper": True}] if on_cpu else [{"triton.cudagraphs": True}]
        made: list[Any] = []
        for way in ways:
            made.append(torch.compile(copy.deepcopy(forms[-1]), dynamic=False))
            with torch.no_grad(), torch._inductor.config.patch({"freezing": True, **way}):
                for _ in range(_WARM_UP):
                    made[-1](self.x)
        return [*forms, *made]


def _loss(network: nn.Module) -> float:
    errors = [row.relative_error for row in fxfact.inspect(network).rows]
    return sum(error**2 for error in errors if error is not None)


def _spread(times: list[float]) -> float:
    low, _, high = quantiles(times, n=4)
    return (high - low) / 2 / median(times)


def _uniform(comparison: Comparison, rule: str, macs: int, multiple_of: int) -> tuple[nn.Module, fxfact.Plan] | None:
    """Return the network and plan of the largest uniform fraction within these MACs."""
    low, high, best = 0.0, 1.0, None
    for _ in range(7):
        middle = (low + high) / 2
        asked: dict[str, Any] = {"rank": middle, "multiple_of": multiple_of, "example_inputs": comparison.x}
        plan = fxfact.plan(comparison.model, [rule, "svd"], **asked)
        if plan.after.macs is not None and plan.after.macs <= macs:
            low, best = middle, plan
        else:
            high = middle
    return None if best is None else (fxfact.apply(best, comparison.model), best)


def _tensorly(plan: fxfact.Plan, model: nn.Module) -> nn.Module | None:
    """Return the model with TensorLy-Torch's layers, with the same ranks, wherever the plan has Tucker.

    TensorLy-Torch has no transposed layers, so these convolutions stay dense.
    """
    try:
        from tltorch import FactorizedConv  # noqa: PLC0415 (an extra of the benchmark)
    except ImportError:
        return None
    network = copy.deepcopy(model)
    for decision in plan.rewrites:
        method, spec = decision.factorization, decision.spec
        if method is None or method.name != "tucker" or spec is None or spec.transposed:
            continue
        conv: Any = network.get_submodule(decision.path)
        rank = (*(decision.rank or ()), *spec.kernel_size)
        layer = FactorizedConv.from_conv(
            conv, rank=rank, factorization="tucker", implementation="factorized", decompose_weights=False
        )
        owner, _, name = decision.path.rpartition(".")
        setattr(network.get_submodule(owner), name, layer.to(conv.weight.device, conv.weight.dtype))
    return network.eval()


def compare(name: str, batch: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return all rows of a network at a batch size."""
    comparison, refused = Comparison(name, batch, given), []
    for share in given.shares:
        try:
            _add_all(comparison, share, given)
        except fxfact.FxfactError as error:
            refused.append({"rule": f"fxfact at {share}", "refused": str(error)})
    return [*comparison.rows(), *refused]


def _add_all(comparison: Comparison, share: float, given: argparse.Namespace) -> None:
    """Add all networks for one budget."""
    started = time.perf_counter()
    budget = fxfact.Latency(share, compiled=given.compiled)
    small = fxfact.factorize(comparison.model, given.factorizations, budget=budget, example_inputs=comparison.x)
    plan = fxfact.plan_of(small)
    comparison.add(f"fxfact at {share}", small, plan, time.perf_counter() - started)
    assert plan.after.macs is not None
    for rule in given.rules:
        started = time.perf_counter()
        if (found := _uniform(comparison, rule, plan.after.macs, given.multiple_of)) is not None:
            comparison.add(f"uniform {rule} at {share}", *found, time.perf_counter() - started)
            if rule == "tucker" and (theirs := _tensorly(found[1], comparison.model)) is not None:
                comparison.add(f"{_TENSORLY_TORCH} at {share}", theirs, None, 0.0)


def summary(tables: dict[str, list[dict[str, Any]]]) -> dict[str, float | None]:
    """Summarize all tables.

    Returns how often a network of fxfact is slower than the dense one, the worst prediction, and by how much the same
    Tucker ranks are faster as plain convolutions than as TensorLy-Torch's layers (geometric mean).
    """
    own = [row for rows in tables.values() for row in rows if row["rule"].startswith("fxfact") and "ms" in row]
    slower = [row for row in own if row["faster"] < 1 - row["±"]]
    ratios = []
    for rows in tables.values():
        ms = {row["rule"]: row.get("ms") for row in rows}
        for rule, theirs in ms.items():
            if rule.startswith(_TENSORLY_TORCH) and (ours := ms.get(rule.replace(_TENSORLY_TORCH, "uniform tucker"))):
                ratios.append(theirs / ours)
    return {
        "networks and budgets": len(own),
        "slower than dense": len(slower),
        "least faster": min((row["faster"] for row in own), default=None),
        "worst prediction": max((abs(row["predicted"] - 1) for row in own if row["predicted"]), default=None),
        "same ranks, over TensorLy-Torch": geometric_mean(ratios) if ratios else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(TIMED), default=list(TIMED))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.7, 0.5, 0.4], help="budgets, as shares of the dense time"
    )
    parser.add_argument("--rules", nargs="*", default=["tucker", "cp"], help="uniform rules, at the same MACs")
    parser.add_argument("--multiple-of", type=int, default=1, help="rank multiple of the uniform rules")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--compiled", action="store_true", help="add inductor with freezing as a form")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--factorizations", nargs="+", default=None, help="default: all of them")
    parser.add_argument("--save", default="latency", help="the name of the JSON file in benchmarks/results")
    given = parser.parse_args()
    tables: dict[str, Any] = {}
    for threads in given.threads:
        torch.set_num_threads(threads)
        for name in given.networks:
            for batch in given.batches:
                on = f"{threads} threads" if given.device == "cpu" else f"{given.device}, {given.dtype}"
                title = f"{name}, batch {batch}, {on}"
                tables[title] = compare(name, batch, given)
                show(title, tables[title])
                save(given.save, {**tables, "summary": [summary(tables)]}, given.device)
    show("all", [summary(tables)])


if __name__ == "__main__":
    main()
