"""One function for each command: takes the parsed arguments, prints a table or JSON, and returns the exit status."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxfact import analysis, api
from fxfact.capture import ExampleInputs, arguments_of
from fxfact.cli.demo import run_demo
from fxfact.cli.export import export_module, save_onnx
from fxfact.cli.inputs import (
    LoadedModel,
    callable_module,
    check_output,
    example_inputs_of,
    input_files,
    load_described_model,
    load_model,
)
from fxfact.cli.options import Arguments
from fxfact.cli.output import (
    check_plot,
    format_times,
    plan_summary,
    plot_front,
    print_progress,
    print_result,
    print_text,
)
from fxfact.cli.plan_options import (
    COST_OPTIONS,
    collect_data,
    find_statistics,
    plan_options,
    read_data,
    save_error_curves,
    statistics_beside,
    with_first_sample,
)
from fxfact.errors import ArgumentError, PlanError, VerificationError
from fxfact.passes import pass_history
from fxfact.planning import Plan
from fxfact.serialization import save
from fxfact.utils import (
    milliseconds,
    processes,
    relative_error,
    summarize_turns,
    terminal_width,
    with_phase,
    wrap_lines,
)

_DECIDED_BY_PLAN = (
    *("rank", "macs", "params", "latency", "loss", "metric", "at_most_drop", "lower_is_better", "minimise"),
    *("factorization", "multiple_of", "include", "exclude", "kinds", "joint", "fold_weights", "error_curves"),
)


def inspect(args: Arguments) -> int:
    """Print every convolution of a model."""
    loaded = load_described_model(args)
    inspection = analysis.inspect(loaded.model, example_inputs=example_inputs_of(loaded))
    rows = [
        {
            "path": row.path,
            "from": row.origin,
            "factorization": row.factorization,
            "rank": row.rank,
            "stages": list(map(str, row.stages)),
            "parameters": row.cost.params,
            "macs": row.cost.macs,
            "relative_error": row.relative_error,
            "recorded_error": row.recorded_error,
            "remark": row.remark,
        }
        for row in inspection.rows
    ]
    print_result(args, inspection, {"convolutions": rows})
    return 0


def plan(args: Arguments) -> int:
    """Make a plan, print it, and write it."""
    if args.keep_statistics and not (args.calibration or args.statistics):
        raise ArgumentError("--keep-statistics writes the statistics of data. Pass --calibration as well.")
    check_plot(args)
    kept = args.keep_statistics
    if args.output and args.calibration and not args.statistics:
        kept = kept or statistics_beside(args.output)
    check_output(args.output, *input_files(args))
    check_output(kept, args.output, args.model, args.weights, args.calibration)
    check_output(args.error_curves, args.output, kept, *input_files(args))
    loaded = load_described_model(args)
    with processes(args.workers) as executor:
        options = plan_options(args, loaded, executor)
        statistics = collect_data(args, loaded, options["calibration"], options["fold_weights"]) if kept else None
        if statistics is not None and options["budget"] is None:  # else plans are measured on the data as well
            options |= {"calibration": statistics, "likelihood": None}
        made = api.plan(loaded.model, args.factorization, **options)
    if kept and statistics is not None:
        statistics.save(kept)
    save_error_curves(args, options)
    if args.output:
        made.save(args.output)
    plot_front(args, made)
    written = " and ".join(file for file in (args.output, kept) if file)
    text = f"{made}\n\nwrote {written}" if written else made
    print_result(args, text, {"plan": made.to_json(), **plan_summary(made), "statistics": kept})
    return 0


def compress(args: Arguments) -> int:
    """Factorize a model, check the result, and write it."""
    _check_compress(args)
    check_plot(args)
    loaded = with_first_sample(args, load_model(args.model, args.input, args.weights))
    as_program = _check_program_output(args, loaded)
    started = time.perf_counter()
    with processes(args.workers) as executor:
        if args.plan:
            made = Plan.load(args.plan)
            find_statistics(args, made)
            plot_front(args, made)
            data, _ = read_data(args, loaded, held_out=made.measured_on_held_out)
            statistics = collect_data(args, loaded, data, made.fold_weights)
            network = api.apply(made, loaded.model, calibration=statistics, executor=executor, progress=args.progress)
        else:
            options = plan_options(args, loaded, executor)
            network = api.factorize(loaded.model, args.factorization, **options)
            made = api.plan_of(network)
            plot_front(args, made)
            save_error_curves(args, options)
    if loaded.inputs is not None and made.rewrites:
        with_phase(partial(analysis.check_rewrite, loaded.model, network, loaded.inputs), "checking", args.progress)
    if as_program and not isinstance(network, ExportedProgram):
        assert loaded.inputs is not None
        network = export_module(network, loaded.inputs, dynamic=args.dynamic_batch)
    if args.output.endswith(".onnx"):
        save_onnx(network, args.output)
    else:
        save(network, args.output)
    seconds = time.perf_counter() - started
    text = f"{made}\n\nwrote {args.output} in {seconds:.1f} s"
    print_result(args, text, {**plan_summary(made), "output": args.output, "seconds": seconds})
    return 0


def verify(args: Arguments) -> int:
    """Compare two networks. Returns 3 if the graph of the second is wrong, or its outputs exceed the tolerance."""
    first, second = _load_both(args)
    inputs = _required_inputs(first, second)
    try:
        found = analysis.verify(first.model, second.model, inputs)
        graph, end_to_end, ok, text = found.graph, found.end_to_end, found.ok, str(found)
    except PlanError as error:
        if pass_history(second.model):
            raise
        if args.tolerance is None:  # without a plan there is no graph to check, so only outputs can be compared
            raise ArgumentError(f"{error} To compare only the outputs, pass --tolerance.") from error
        outputs = [_run(loaded.model, inputs) for loaded in (first, second)]
        graph, ok, end_to_end = None, None, relative_error(*outputs)
        text = f"relative difference {end_to_end:.2e} (B has no plan of fxfact, so only the outputs were compared)"
    within_tolerance = None if args.tolerance is None else end_to_end <= args.tolerance
    if within_tolerance is not None:
        text += (
            f"\nthe outputs differ by {'no more' if within_tolerance else 'MORE'} than --tolerance {args.tolerance:g}"
        )
    data = {"graph": graph, "end_to_end": end_to_end, "ok": ok, "within_tolerance": within_tolerance}
    print_result(args, text, data)
    return 3 if ok is False or within_tolerance is False else 0


def report(args: Arguments) -> int:
    """Report what was changed in a network, what it saves and what it costs."""
    check_output(args.output, *input_files(args), args.other, args.other_weights)
    if args.output and not args.output.endswith((".html", ".json")):
        raise ArgumentError(f"-o must be NAME.html (a page) or NAME.json (data), got {args.output}.")
    if args.threads:
        torch.set_num_threads(args.threads)
    first, second = _load_both(args)
    found = analysis.report(first.model, second.model, _required_inputs(first, second), progress=args.progress)
    if args.output:
        found.save(args.output)
    print_result(args, found, found.to_json())
    return 0


def bench(args: Arguments) -> int:
    """Time two networks on the same inputs, in turns."""
    if args.threads:
        torch.set_num_threads(args.threads)
    both = _load_both(args)
    inputs = _required_inputs(*both)
    networks = [callable_module(loaded.model) for loaded in both]
    for loaded in both:
        _run(loaded.model, inputs)  # raises an error that says which inputs failed
    positional, keywords = arguments_of(inputs)
    calls = [partial(network, *positional, **keywords) for network in networks]
    times = milliseconds(calls, repeats=args.repeats, number=args.number)
    rows = [
        {
            "network": name,
            "ms": median(measured),
            "fastest": min(measured),
            "slowest": max(measured),
            "parameters": sum(p.numel() for p in network.parameters()),
        }
        for name, measured, network in zip((args.model, args.other), times, networks, strict=True)
    ]
    first_ms, second_ms = summarize_turns(times)
    speedup = first_ms / second_ms
    threads = torch.get_num_threads()
    where = analysis.format_threads(threads)
    sentence = f"{args.other} is {speedup:.2f}× as fast as {args.model} (median ratio of the turns), on {where}"
    text = f"{format_times(rows)}\n\n{wrap_lines(sentence, terminal_width())}"
    print_result(args, text, {"networks": rows, "speedup": speedup, "threads": threads})
    return 0


def demo(args: Arguments) -> int:
    """Train, factorize and compare a small network."""
    run_demo(
        args.factorization,
        args.rank,
        seed=args.seed,
        epochs=args.epochs,
        print_text=print_text,
        print_progress=print_progress,
    )
    return 0


def _check_compress(args: Arguments) -> None:
    """Raise ArgumentError or FileError for arguments that contradict each other, before anything is loaded."""
    if not args.output.endswith((".pt2", ".pt", ".onnx")):
        raise ArgumentError(f"-o must be NAME.pt2 (a program), NAME.onnx or NAME.pt (weights), got {args.output}.")
    check_output(args.output, args.plan, args.error_curves, *input_files(args))
    check_output(args.error_curves, args.plan, *input_files(args))
    if not args.plan:
        if all(getattr(args, option.removeprefix("--")) is None for option in COST_OPTIONS):
            raise ArgumentError(
                f"Say what the network may cost, by one of {', '.join(COST_OPTIONS)}. For half of the "
                f"multiply-accumulates: fxfact compress {args.model} -o {args.output} --macs 0.5 --calibration "
                f"{args.calibration or 'images.npy'}"
            )
        return
    if decided := [name for name in _DECIDED_BY_PLAN if getattr(args, name) is not None]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in decided)
        raise ArgumentError(f"--plan already decides about every layer. Remove {options}.")
    if args.statistics and args.calibration:
        raise ArgumentError("--plan with --statistics does not use --calibration. Remove one of the two.")
    if args.likelihood and not args.calibration:
        raise ArgumentError("--likelihood is only used with data. Pass --calibration as well, or remove it.")


def _check_program_output(args: Arguments, loaded: LoadedModel) -> bool:
    """Return whether a program is written. Raises ArgumentError if the model cannot be written that way."""
    as_program: bool = args.output.endswith((".pt2", ".onnx"))
    if isinstance(loaded.model, ExportedProgram) and not as_program:
        raise ArgumentError("MODEL is an exported program, and so is the result. Pass -o NAME.pt2 or NAME.onnx.")
    if args.dynamic_batch and (isinstance(loaded.model, ExportedProgram) or not as_program):
        raise ArgumentError(
            "--dynamic-batch only applies when a module is exported. Pass package.module:callable and -o NAME.pt2."
        )
    if as_program and loaded.inputs is None:
        raise ArgumentError(
            "To export a module, example inputs are needed. Pass their shape, --input 1,3,224,224, or --calibration "
            "DATA."
        )
    return as_program


def _load_both(args: Arguments) -> tuple[LoadedModel, LoadedModel]:
    return (
        load_model(args.model, args.input, args.weights),
        load_model(args.other, args.input, args.other_weights),
    )


def _required_inputs(*models: LoadedModel) -> ExampleInputs:
    inputs = next((loaded.inputs for loaded in models if loaded.inputs is not None), None)
    if inputs is None:
        raise ArgumentError("The networks have to be run. Pass the shape of their input: --input 1,3,224,224.")
    return inputs


def _run(model: nn.Module | ExportedProgram, inputs: ExampleInputs) -> Any:
    args, kwargs = arguments_of(inputs)
    with torch.no_grad():
        try:
            return callable_module(model)(*args, **kwargs)
        except Exception as error:
            raise VerificationError(f"A network fails on these inputs: {error}") from error
