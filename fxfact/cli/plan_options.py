"""From the arguments of a command to those of ``fxfact.plan``."""

from __future__ import annotations

import os
from concurrent.futures import Executor
from typing import Any

from fxfact import api
from fxfact.calibration import MAX_SAMPLES, Statistics, split_held_out, take_samples, with_example
from fxfact.cli.inputs import (
    LoadedModel,
    example_inputs_of,
    import_function,
    model_dtype,
    read_batches,
)
from fxfact.cli.options import Arguments
from fxfact.errors import ArgumentError
from fxfact.planning import KINDS, Budget, ErrorCurveCache, Latency, Loss, Macs, Metric, Params, Plan

COST_OPTIONS = ("--macs", "--params", "--latency", "--loss", "--metric", "--rank")


def plan_options(args: Arguments, loaded: LoadedModel, executor: Executor | None) -> dict[str, Any]:
    """Return the keyword arguments of ``fxfact.plan`` and ``fxfact.factorize``."""
    budget = _budget(args)
    if args.statistics and args.calibration and budget is None:
        raise ArgumentError(
            "With --statistics, --calibration only measures a plan for a budget. Pass a budget such as --macs 0.5, or "
            "remove --calibration."
        )
    if args.error_curves and budget is None:
        raise ArgumentError("--error-curves is only used with a budget. Pass one, such as --macs 0.5, or remove it.")
    data, held_out = read_data(args, loaded, held_out=args.loss is not None)
    return {
        "rank": args.rank,
        "budget": budget,
        "include": args.include or None,
        "exclude": args.exclude or None,
        "kinds": args.kinds or KINDS,
        "joint": args.joint or (),
        "multiple_of": args.multiple_of,
        "fold_weights": bool(args.fold_weights),
        "example_inputs": example_inputs_of(loaded),
        "calibration": data,
        "held_out": held_out or None,
        "likelihood": args.likelihood,
        "error_curves": load_error_curves(args),
        "executor": executor,
        "progress": args.progress,
    }


def _budget(args: Arguments) -> Budget | Loss | Metric | None:
    """Return the budget of the arguments, or None if there is none."""
    sizes = {Macs: args.macs, Params: args.params, Latency: args.latency}
    budgets: list[Budget | Loss | Metric] = [kind(**size) for kind, size in sizes.items() if size is not None]
    budgets += [Loss(args.loss)] if args.loss is not None else []
    budgets += [_metric(args)] if args.metric is not None else []
    if len(budgets) + (args.rank is not None) > 1:
        raise ArgumentError(f"Pass only one of {', '.join(COST_OPTIONS)}.")
    own = {"--at-most-drop": args.at_most_drop, "--lower-is-better": args.lower_is_better, "--minimise": args.minimise}
    if args.metric is None and (useless := [option for option, value in own.items() if value is not None]):
        raise ArgumentError(f"{', '.join(useless)} can only be used with --metric package.module:callable.")
    return budgets[0] if budgets else None


def _metric(args: Arguments) -> Metric:
    if args.at_most_drop is None:
        raise ArgumentError("--metric needs to know by how much it may drop. Pass --at-most-drop 0.5 as well.")
    units: dict[str, type[Budget]] = {"macs": Macs, "params": Params, "latency": Latency}
    return Metric(
        import_function("--metric", args.metric),
        args.at_most_drop,
        lower_is_better=bool(args.lower_is_better),
        minimise=units[args.minimise or "macs"],
    )


def collect_data(
    args: Arguments, loaded: LoadedModel, data: Statistics | list[Any] | None, fold_weights: bool
) -> Statistics | None:
    """Collect the statistics of batches. Statistics and None are returned as they are."""
    if data is None or isinstance(data, Statistics):
        return data
    return api.calibrate(
        loaded.model,
        data,
        example_inputs=example_inputs_of(loaded),
        likelihood=args.likelihood,
        fold_weights=fold_weights,
        progress=args.progress,
    )


def statistics_beside(plan: str) -> str:
    """Return the file in which the statistics of a plan's data are kept."""
    return f"{os.path.splitext(plan)[0]}.statistics.npz"


def read_data(
    args: Arguments, loaded: LoadedModel, *, held_out: bool
) -> tuple[Statistics | list[Any] | None, list[Any]]:
    """Return the data to learn from, and the batches to measure a plan on.

    With --statistics all batches are for measuring. Otherwise some are held out if ``held_out`` is set.
    """
    if args.max_samples and not args.calibration:
        raise ArgumentError("--max-samples is only used with data. Pass --calibration as well, or remove it.")
    dtype = model_dtype(loaded.model)
    batches: list[Any] = read_batches(args.calibration, args.batch, dtype) if args.calibration else []
    batches = list(take_samples(batches, args.max_samples or MAX_SAMPLES)) if batches else []
    if args.statistics:
        return Statistics.load(args.statistics), batches
    return split_held_out(batches) if held_out and batches else (batches or None, [])


def with_first_sample(args: Arguments, loaded: LoadedModel) -> LoadedModel:
    """Return a module that has no example inputs with the first sample of the data, if there are any, as those."""
    if loaded.inputs is not None or not args.calibration:
        return loaded
    batches = read_batches(args.calibration, args.batch, model_dtype(loaded.model))
    return loaded._replace(inputs=with_example(loaded.model, None, batches)[0])


def load_error_curves(args: Arguments) -> ErrorCurveCache | None:
    """Return the curves of the file that --error-curves names, or an empty cache if it does not exist yet."""
    if args.error_curves is None:
        return None
    return ErrorCurveCache.load(args.error_curves) if os.path.exists(args.error_curves) else ErrorCurveCache()


def save_error_curves(args: Arguments, options: dict[str, Any]) -> None:
    """Write the error curves to the file that the arguments name, if any."""
    if args.error_curves is not None:
        options["error_curves"].save(args.error_curves)


def find_statistics(args: Arguments, made: Plan) -> None:
    """Use the statistics beside a plan that was made with data, if no data are given. Raises ArgumentError."""
    if not made.uses_statistics or not made.rewrites or args.statistics or args.calibration:
        return
    beside = statistics_beside(args.plan)
    if not os.path.exists(beside):
        raise ArgumentError(
            f"{args.plan} was made with data, and {beside}, where fxfact plan keeps their statistics, is missing. Pass "
            "the data again, --calibration DATA, or the statistics, --statistics FILE."
        )
    args.statistics = beside
