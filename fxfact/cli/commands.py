"""What each command does: from parsed arguments to what is printed, as a table or as JSON."""

from __future__ import annotations

import time
from concurrent.futures import Executor
from functools import partial
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from fxfact.analysis import check_rewrite, on_threads
from fxfact.analysis import inspect as look
from fxfact.analysis import report as make_report
from fxfact.analysis import verify as compare
from fxfact.api import apply, calibrate, factorize, plan_of
from fxfact.api import plan as decide
from fxfact.calibration import Statistics, split_held_out
from fxfact.capture import ExampleInputs, arguments_of
from fxfact.cli.demo import run_demo
from fxfact.cli.inputs import (
    Arguments,
    LoadedModel,
    check_output,
    dtype_of,
    files_of,
    read_batches,
    read_described,
    read_model,
    runnable,
)
from fxfact.cli.output import overwrite, say, show, summary
from fxfact.errors import ArgumentError, PlanError, VerificationError
from fxfact.passes import pass_history, set_history
from fxfact.planning import Latency, Loss, Macs, Params, Plan
from fxfact.serialization import save
from fxfact.utils import compared, milliseconds, processes, relative_error

_CHOOSING = (
    *("rank", "macs", "params", "latency", "loss"),
    *("factorization", "multiple_of", "include", "exclude", "fold_weights"),
)  # what a plan has said already


def inspect(given: Arguments) -> int:
    """Print every convolution of a model."""
    read = read_described(given)
    found = look(read.model, example_inputs=_example(read))
    rows = [{"path": r.path, "from": r.origin, "factorization": r.factorization, "rank": r.rank,
             "stages": list(map(str, r.stages)), "parameters": r.cost.params, "macs": r.cost.macs,
             "relative_error": r.relative_error, "remark": r.remark} for r in found.rows]  # fmt: skip
    show(given, found, {"convolutions": rows})
    return 0


def plan(given: Arguments) -> int:
    """Decide, and write the plan."""
    if given.keep_statistics and not (given.calibration or given.statistics):
        raise ArgumentError("--keep-statistics keeps those of data: pass --calibration")
    check_output(given.output, *files_of(given))
    check_output(given.keep_statistics, given.output, given.model, given.weights, given.calibration)
    read = read_described(given)
    with processes(given.workers) as executor:
        options = _options(given, read, executor)
        if given.keep_statistics:
            options["calibration"] = _statistics(given, read, options["calibration"], options["fold_weights"])
        made = decide(read.model, given.factorization, **options)
    if given.keep_statistics:
        options["calibration"].save(given.keep_statistics)
    if given.output:
        made.save(given.output)
    show(given, made, {"plan": made.to_json(), **summary(made)})
    return 0


def compress(given: Arguments) -> int:
    """Factorize, check and write the network."""
    if not given.output.endswith((".pt2", ".pt")):
        raise ArgumentError(f"-o is the file of the network, NAME.pt2 or NAME.pt, got {given.output}")
    check_output(given.output, given.plan, *files_of(given))
    read = read_model(given.model, given.input, given.weights)
    as_program = given.output.endswith(".pt2")
    if isinstance(read.model, ExportedProgram) and not as_program:
        raise ArgumentError("an exported program is written as one: -o NAME.pt2")
    if given.dynamic_batch and (isinstance(read.model, ExportedProgram) or not as_program):
        raise ArgumentError("--dynamic-batch is for a module that is made a program: -o NAME.pt2")
    if as_program and read.inputs is None:
        raise ArgumentError("a .pt2 file holds a program of example inputs: pass --input 1,3,224,224")
    started = time.perf_counter()
    if given.plan and (chosen := [name for name in _CHOOSING if getattr(given, name) is not None]):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in chosen)
        raise ArgumentError(f"--plan says what becomes of every convolution: pass no {options} with it")
    if given.plan and given.statistics and given.calibration:
        raise ArgumentError("with --plan and --statistics nothing is left to measure: pass no --calibration")
    if given.plan and given.likelihood and not given.calibration:
        raise ArgumentError("--likelihood says what outputs mean for data: pass it with --calibration")
    with processes(given.workers) as executor:
        if given.plan:
            made = Plan.load(given.plan)
            known, _ = _data(given, read, measured=made.measured_loss_increase is not None)
            statistics = _statistics(given, read, known, made.fold_weights)
            network = apply(made, read.model, calibration=statistics, executor=executor, progress=given.progress)
        else:
            network = factorize(read.model, given.factorization, **_options(given, read, executor))
            made = plan_of(network)
    if read.inputs is not None and made.rewrites:
        check_rewrite(read.model, network, read.inputs)
    if as_program and not isinstance(network, ExportedProgram):
        network = _exported(network, read, dynamic=given.dynamic_batch)
    save(network, given.output)
    seconds = time.perf_counter() - started
    show(given, f"{made}\n\n{given.output}: written, after {seconds:.1f} s",
          {**summary(made), "output": given.output, "seconds": seconds})  # fmt: skip
    return 0


def verify(given: Arguments) -> int:
    """Compare two networks: 0 where the second is right (and near enough), 3 where not."""
    one, other = (read_model(text, given.input, weights) for text, weights in _two(given))
    inputs = _needed(one, other)
    try:
        found = compare(one.model, other.model, inputs)
        graph, end_to_end, right, shown = found.graph, found.end_to_end, found.ok, str(found)
    except PlanError as error:
        if pass_history(other.model):
            raise
        if given.tolerance is None:  # not made by fxfact, or not known to be
            raise ArgumentError(f"{error} To compare outputs alone pass --tolerance.") from error
        outputs = [_run(read.model, inputs) for read in (one, other)]
        graph, right, end_to_end = None, None, relative_error(*outputs)
        shown = f"end to end {end_to_end:.2e} (the second says nothing of having been factorized)"
    near = given.tolerance is None or end_to_end <= given.tolerance
    show(given, shown, {"graph": graph, "end_to_end": end_to_end, "ok": right, "near": near})
    return 3 if right is False or not near else 0


def report(given: Arguments) -> int:
    """What was done to a network, and what that saves and costs; as a page where -o says so."""
    check_output(given.output, *files_of(given), given.other, given.other_weights)
    if given.output and not given.output.endswith((".html", ".json")):
        raise ArgumentError(f"-o is a page NAME.html or data NAME.json, got {given.output}")
    if given.threads:
        torch.set_num_threads(given.threads)
    reads = [read_model(text, given.input, weights) for text, weights in _two(given)]
    found = make_report(reads[0].model, reads[1].model, _needed(*reads), progress=given.progress)
    if given.output:
        found.save(given.output)
    show(given, found, found.to_json())
    return 0


def bench(given: Arguments) -> int:
    """Time two networks on the same inputs, taking turns."""
    if given.threads:
        torch.set_num_threads(given.threads)
    reads = [read_model(text, given.input, weights) for text, weights in _two(given)]
    inputs = _needed(*reads)
    networks = [runnable(read.model) for read in reads]
    for read in reads:
        _run(read.model, inputs)  # which says so where it does not
    args, kwargs = arguments_of(inputs)
    calls = [partial(network, *args, **kwargs) for network in networks]
    times = milliseconds(calls, repeats=given.repeats, number=given.number)
    rows = [
        {"network": text, "ms": median(own), "fastest": min(own), "slowest": max(own),
         "parameters": sum(p.numel() for p in network.parameters())}
        for (text, _), own, network in zip(_two(given), times, networks, strict=True)
    ]  # fmt: skip
    first, second = compared(times)
    ratio = first / second
    table = tabulate(rows, headers="keys", floatfmt=".3f")
    words = (
        f"{table}\n\nthe second is {ratio:.2f}× as fast by the turns' ratios, on {on_threads(torch.get_num_threads())}"
    )
    show(given, words, {"networks": rows, "speedup": ratio, "threads": torch.get_num_threads()})
    return 0


def demo(given: Arguments) -> int:
    """Train, factorize and compare a small network."""
    run_demo(given.factorization, given.rank, seed=given.seed, epochs=given.epochs, say=say, progress=overwrite)
    return 0


def _options(given: Arguments, read: LoadedModel, executor: Executor | None) -> dict[str, Any]:
    """What is to be chosen, and of what data, as ``plan`` and ``factorize`` take it."""
    budgets = [kind(value) for kind, value in ((Macs, given.macs), (Params, given.params), (Latency, given.latency),
               (Loss, given.loss)) if value is not None]  # fmt: skip
    if len(budgets) > 1 or (budgets and given.rank is not None):
        raise ArgumentError("pass one of --rank, --macs, --params, --latency and --loss")
    if given.statistics and given.calibration and not budgets:
        raise ArgumentError("ranks that are given leave nothing to measure: pass no --calibration beside --statistics")
    known, held_out = _data(given, read, measured=given.loss is not None)
    return {
        "rank": given.rank, "include": given.include or None, "exclude": given.exclude or None,
        "fold_weights": bool(given.fold_weights), "example_inputs": _example(read), "progress": given.progress,
        "multiple_of": given.multiple_of, "executor": executor, "budget": budgets[0] if budgets else None,
        "calibration": known, "held_out": held_out or None, "likelihood": given.likelihood,
    }  # fmt: skip


def _statistics(
    given: Arguments, read: LoadedModel, known: Statistics | list[Any] | None, fold_weights: bool
) -> Statistics | None:
    """Those known, or of the batches."""
    if known is None or isinstance(known, Statistics):
        return known
    options: dict[str, Any] = {"likelihood": given.likelihood, "fold_weights": fold_weights}
    return calibrate(read.model, known, example_inputs=_example(read), progress=given.progress, **options)


def _data(given: Arguments, read: LoadedModel, *, measured: bool) -> tuple[Statistics | list[Any] | None, list[Any]]:
    """What to learn from, and batches to measure on: all beside statistics, else some where a plan is ``measured``."""
    dtype = dtype_of(read.model)
    batches: list[Any] = read_batches(given.calibration, given.batch, dtype) if given.calibration else []
    if given.statistics:
        return Statistics.load(given.statistics), batches
    return split_held_out(batches) if measured and batches else (batches or None, [])


def _exported(network: nn.Module, read: LoadedModel, *, dynamic: bool) -> ExportedProgram:
    """The factorized module as a program that knows what was done to it."""
    assert read.inputs is not None
    (inputs, _), shapes = arguments_of(read.inputs), None  # a module is given no others
    if dynamic:
        batch = torch.export.Dim("batch", min=1)
        shapes = tree_map(lambda value: {0: batch} if isinstance(value, torch.Tensor) else None, inputs)
        inputs = tree_map(_two_samples, inputs)
    try:
        program = torch.export.export(network, inputs, dynamic_shapes=shapes)
    except Exception as error:
        raise ArgumentError(f"torch.export cannot export the network, write it as NAME.pt: {error}") from error
    set_history(program.graph_module, pass_history(network))
    return program


def _two_samples(value: Any) -> Any:
    """Of one sample two: PyTorch takes a size of one for a constant."""
    alone = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == 1
    return torch.cat([value, value]) if alone else value


def _two(given: Arguments) -> list[tuple[str, str | None]]:
    return [(given.model, given.weights), (given.other, given.other_weights)]


def _example(read: LoadedModel) -> Any:
    return None if isinstance(read.model, ExportedProgram) else read.inputs


def _needed(*reads: LoadedModel) -> ExampleInputs:
    inputs = next((read.inputs for read in reads if read.inputs is not None), None)
    if inputs is None:
        raise ArgumentError("pass --input 1,3,224,224, the shape of what the networks are called with")
    return inputs


def _run(model: nn.Module | ExportedProgram, inputs: ExampleInputs) -> Any:
    args, kwargs = arguments_of(inputs)
    with torch.no_grad():
        try:
            return runnable(model)(*args, **kwargs)
        except Exception as error:
            raise VerificationError(f"a network fails on these inputs: {error}") from error
