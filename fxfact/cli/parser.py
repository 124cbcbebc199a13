"""The arguments of every command, and ``main``, which runs them."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

from fxfact.cli import commands
from fxfact.cli.inputs import Arguments
from fxfact.errors import FxfactError

_MODEL_HELP = "a .pt2 file of torch.export.save, or package.module:callable, which must return a torch.nn.Module"
_EXIT_STATUS = (
    "exit status: 0 success; 1 the command failed, and the message says why; 2 wrong arguments; 3 verify found a "
    "difference; 130 interrupted; 141 the output was closed by its reader"
)
_OPTION_OF = {
    "example_inputs": "--input 1,3,224,224",
    "calibration=": "--calibration DATA",
    "fold_weights": "--fold-weights",
    "multiple_of": "--multiple-of N",
}  # how an argument of the Python API that an error names is passed on the command line


class _Command(NamedTuple):
    name: str
    run: Callable[[Arguments], int]
    help: str
    example: str
    add_arguments: tuple[Callable[[argparse.ArgumentParser], None], ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line without the program's name. Default: ``sys.argv[1:]``.

    Returns:
        The exit status: 0 for success, 1 if the command failed, 3 if ``verify`` found a difference, 130 if it was
        interrupted, 141 if the reader of the output closed it.

    Raises:
        SystemExit: with status 2 if the arguments are wrong, with 0 after ``--help`` and ``--version``.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does, for package.module:callable
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal can show arrows
    args = _build_parser().parse_args(arguments)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except FxfactError as error:
        print(f"fxfact: {_with_option_names(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader closed the pipe, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _with_option_names(message: str) -> str:
    """Append the command-line options for the arguments of the Python API that a message names."""
    options = [
        f"{name.rstrip('=')} is {option}"
        for name, option in _OPTION_OF.items()
        if re.search(rf"(?<![\w.]){name}", message)
    ]
    return f"{message} (On the command line {', '.join(options)}.)" if options else message


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxfact", description="Factorize the convolutions of a trained network.", epilog=_EXIT_STATUS
    )
    parser.add_argument("--version", action="version", version=f"fxfact {metadata.version('fxfact')}")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in _commands():
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=f"example: fxfact {command.name} {command.example}",
        )
        subparser.set_defaults(run=command.run)
        for add_arguments in command.add_arguments:
            add_arguments(subparser)
    return parser


def _commands() -> tuple[_Command, ...]:
    choice = (_add_scope, _add_budget, _add_data, _add_computation)
    return (
        _Command("inspect", commands.inspect, "list every convolution of a network", "resnet.pt2", (_add_model,)),
        _Command(
            "plan",
            commands.plan,
            "choose a factorization and a rank for every convolution",
            "resnet.pt2 --macs 0.5 --calibration images.npy -o plan.json",
            (_add_model, *choice, _add_plan_output),
        ),
        _Command(
            "compress",
            commands.compress,
            "factorize a network, check the result and write it",
            "resnet.pt2 -o small.pt2 --macs 0.5 --calibration images.npy",
            (_add_model, *choice, _add_compress_output),
        ),
        _Command(
            "verify",
            commands.verify,
            "compare a factorized network with its original",
            "resnet.pt2 small.pt2",
            (_add_two_models, _add_tolerance),
        ),
        _Command(
            "bench",
            commands.bench,
            "time two networks side by side",
            "resnet.pt2 small.pt2 --threads 1",
            (_add_two_models, _add_timing),
        ),
        _Command(
            "report",
            commands.report,
            "show what was changed in a network, what it saves and what it costs",
            "resnet.pt2 small.pt2 -o report.html",
            (_add_two_models, _add_report_output),
        ),
        _Command(
            "demo",
            commands.demo,
            "train, factorize and compare a small network on handwritten digits (about 20 s)",
            "--factorization cp --rank 0.5",
            (_add_demo,),
        ),
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    group.add_argument("--weights", metavar="FILE", help="a state dict to load into package.module:callable")
    _add_input(group)
    _add_json(parser)


def _add_two_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument("model", metavar="A", help=f"the original: {_MODEL_HELP}")
    group.add_argument("other", metavar="B", help="the network to compare with it, in one of the same two forms")
    group.add_argument("--weights", metavar="FILE", help="a state dict to load into A")
    group.add_argument("--other-weights", metavar="FILE", help="a state dict to load into B")
    _add_input(group)
    _add_json(parser)


def _add_input(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--input",
        type=_input_tensor,
        action="append",
        metavar="SIZES",
        help="the shape of an input, such as 1,3,224,224; repeat it for every input. The input is filled with random "
        "normal numbers. 1,77:int64 is an integer input, filled with zeros",
    )
    group.add_argument(
        "--import",
        dest="imported",
        type=_import_package,
        action="append",
        metavar="PACKAGE",
        help="a package to import before a .pt2 file is read, for example transformers.modeling_outputs, if the "
        "program returns objects of that package",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_scope(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to factorize")
    group.add_argument(
        "--factorization",
        type=_names,
        metavar="NAMES",
        help="a name, or several separated by commas (default: tucker, or all of them under a budget)",
    )
    group.add_argument(
        "--include", action="append", metavar="GLOB", help="only convolutions at these paths; repeatable"
    )
    group.add_argument("--exclude", action="append", metavar="GLOB", help="no convolutions at these paths; repeatable")
    group.add_argument(
        "--fold-weights",
        action="store_true",
        default=None,
        help="turn weights that are computed (weight_norm, parametrizations) into plain parameters",
    )


def _add_budget(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ranks, or a budget (pass one)")
    group.add_argument(
        "--rank", type=_rank, help="a fraction of each convolution's parameters, an integer, or 'same' (default: 0.5)"
    )
    group.add_argument(
        "--macs", type=float, metavar="SHARE", help="budget: share of the network's multiply-accumulates"
    )
    group.add_argument("--params", type=float, metavar="SHARE", help="budget: share of the network's parameters")
    group.add_argument(
        "--latency",
        type=float,
        metavar="SHARE",
        help="budget: share of the time of the dense network on this machine, in its fastest form for a module, as it "
        "is for a program",
    )
    group.add_argument(
        "--loss",
        type=float,
        metavar="NATS",
        help="budget: largest increase of the loss, in nats of KL divergence for one sample, measured on every fourth "
        "batch",
    )
    group.add_argument(
        "--multiple-of",
        type=_positive_int,
        metavar="N",
        help="round ranks to multiples of N (default: 1; with --latency 32, 16 or 8)",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data (no labels needed)")
    group.add_argument(
        "--calibration",
        metavar="DATA",
        help="samples to learn from: a .npy file with samples along the first axis, or a folder of them. With "
        "--statistics they are used to measure the plan",
    )
    group.add_argument(
        "--batch", type=_positive_int, default=64, metavar="N", help="samples in a batch (default: %(default)s)"
    )
    group.add_argument(
        "--likelihood", choices=["categorical", "gaussian"], help="what the output is: logits of classes, or numbers"
    )
    group.add_argument("--statistics", metavar="FILE", help="statistics that an earlier plan --keep-statistics wrote")
    group.add_argument(
        "--error-curves",
        metavar="FILE",
        help="a cache of the error curves of a budget. The file is read if it exists, and then updated. Further plans "
        "from the same statistics take seconds",
    )


def _add_computation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--workers",
        type=_positive_int,
        default=1,
        metavar="N",
        help="number of worker processes, each with one thread (default: none)",
    )
    _add_progress(group)


def _add_progress(group: argparse._ActionsContainer) -> None:
    group.add_argument("--progress", action="store_true", help="show progress bars on stderr (needs tqdm)")


def _add_plan_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="FILE", help="write the plan to this file")
    group.add_argument(
        "--keep-statistics",
        metavar="FILE",
        help="write the statistics of the data to this file, for other plans. The plan is then made from them alone",
    )


def _add_compress_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="NAME.pt2 (a program) or NAME.pt (weights for fxfact.load)",
    )
    group.add_argument("--plan", metavar="FILE", help="apply the plan in this file instead of making one")
    group.add_argument(
        "--dynamic-batch", action="store_true", help="export a module to a program that takes any batch size"
    )


def _add_report_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="FILE", help="NAME.html (a page with pictures) or NAME.json")
    _add_threads(group)
    _add_progress(group)


def _add_tolerance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tolerance", type=float, help="fail if the relative difference of the outputs is larger than this"
    )


def _add_timing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("timing")
    _add_threads(group)
    group.add_argument("--repeats", type=_positive_int, default=15, help="number of turns (default: %(default)s)")
    group.add_argument("--number", type=_positive_int, default=5, help="calls in a turn (default: %(default)s)")


def _add_threads(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--threads", type=_positive_int, metavar="N", help="number of threads (default: that of PyTorch)"
    )


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--factorization",
        type=_names,
        default="tucker",
        metavar="NAMES",
        help="a name, or several separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--rank",
        type=_rank,
        default=0.25,
        help="a fraction of each convolution's parameters, an integer, or 'same' (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: %(default)s)")
    parser.add_argument("--epochs", type=_positive_int, default=10, help="epochs of training (default: %(default)s)")


def _names(text: str) -> str | list[str]:
    names = text.split(",")
    return names if len(names) > 1 else text


def _rank(text: str) -> int | float | str:
    if text == "same":
        return text
    try:
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a fraction such as 0.5, an integer, or 'same', got {text!r}"
        ) from None


def _positive_int(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _import_package(text: str) -> str:
    try:
        importlib.import_module(text)
    except Exception as error:  # a package can raise anything while it is imported
        raise argparse.ArgumentTypeError(f"{text} cannot be imported: {error}") from error
    return text


def _input_tensor(text: str) -> Tensor:
    sizes, _, dtype_name = text.partition(":")
    shape = [_positive_int(size) for size in sizes.split(",")]
    dtype = getattr(torch, dtype_name or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{dtype_name} is not a dtype of torch")
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.zeros(shape, dtype=dtype)
