"""The command line: which commands there are, and ``main``, which runs them."""

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

from fxfact.cli.options import (
    Arguments,
    add_budget,
    add_compress_output,
    add_computation,
    add_data,
    add_demo,
    add_model,
    add_plan_output,
    add_report_output,
    add_scope,
    add_timing,
    add_tolerance,
    add_two_models,
)
from fxfact.errors import FxfactError

_EXIT_STATUS = (
    "exit status: 0 success; 1 the command failed, and the message says why; 2 wrong arguments; 3 verify found a "
    "difference; 130 interrupted; 141 the output was closed by its reader"
)
_OPTION_OF = {
    "example_inputs": ("input", "--input 1,3,224,224"),
    "calibration": ("calibration", "--calibration DATA"),
    "held_out": ("calibration", "--calibration DATA with --statistics FILE"),
    "likelihood=": ("likelihood", "--likelihood categorical or gaussian"),
    "fold_weights": ("fold_weights", "--fold-weights"),
    "multiple_of": ("multiple_of", "--multiple-of N"),
    "smaller batches": ("batch", "--batch N"),
}  # by the argument of the Python API that an error names: the option in the parsed arguments, and how it is written
_ONLY_IN_PYTHON = ("capture=", "leaf_modules", "transform=", "weights='empty'", "generator=", "allow_growth")


class _Command(NamedTuple):
    name: str
    help: str
    example: str
    add_arguments: tuple[Callable[[argparse.ArgumentParser], None], ...]


_CHOICES = (add_scope, add_budget, add_data, add_computation)
_COMMANDS = (
    _Command("inspect", "list every convolution of a network", "resnet.pt2", (add_model,)),
    _Command(
        "plan",
        "choose a factorization and a rank for every convolution",
        "resnet.pt2 --macs 0.5 --calibration images.npy -o plan.json",
        (add_model, *_CHOICES, add_plan_output),
    ),
    _Command(
        "compress",
        "factorize a network, check the result and write it",
        "resnet.pt2 -o small.pt2 --macs 0.5 --calibration images.npy",
        (add_model, *_CHOICES, add_compress_output),
    ),
    _Command(
        "verify",
        "compare a factorized network with its original",
        "resnet.pt2 small.pt2",
        (add_two_models, add_tolerance),
    ),
    _Command(
        "bench",
        "time two networks side by side",
        "resnet.pt2 small.pt2 --threads 1",
        (add_two_models, add_timing),
    ),
    _Command(
        "report",
        "show the changes in a network, their savings and their costs",
        "resnet.pt2 small.pt2 -o report.html",
        (add_two_models, add_report_output),
    ),
    _Command(
        "demo",
        "train, factorize and compare a small network on handwritten digits (half a minute)",
        "--factorization cp --rank 0.5",
        (add_demo,),
    ),
)


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
        commands = importlib.import_module("fxfact.cli.commands")  # only now: it imports PyTorch, which takes seconds
        status: int = getattr(commands, args.command)(args)
        sys.stdout.flush()
        return status
    except FxfactError as error:
        print(f"fxfact: {_with_option_names(str(error), args)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader closed the pipe, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _with_option_names(message: str, args: Arguments) -> str:
    """Append how the arguments of the Python API that a message names are passed to this command."""

    def names(argument: str) -> bool:  # but not as the subject of the message, as in "calibration: batch 3 is empty"
        end = "" if argument.endswith("=") else r"(?![\w:])"
        return re.search(rf"(?<![\w.-]){re.escape(argument)}{end}", message) is not None

    spelled = [
        f"{name.rstrip('=')} is {text}"
        for name, (option, text) in _OPTION_OF.items()
        if hasattr(args, option) and names(name)
    ]
    python = [f"{name} can only be passed in Python" for name in _ONLY_IN_PYTHON if name in message]
    return f"{message} (On the command line {', '.join([*spelled, *python])}.)" if spelled or python else message


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxfact", description="Factorize the convolutions of a trained network.", epilog=_EXIT_STATUS
    )
    parser.add_argument("--version", action="version", version=f"fxfact {metadata.version('fxfact')}")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in _COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=f"example: fxfact {command.name} {command.example}",
        )
        subparser.set_defaults(command=command.name)
        for add_arguments in command.add_arguments:
            add_arguments(subparser)
    return parser
