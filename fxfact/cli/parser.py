"""The command line: which commands there are, and ``main``, which runs them."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import NamedTuple

from fxfact.cli.options import (
    Arguments,
    add_budget,
    add_compress_output,
    add_computation,
    add_data,
    add_demo,
    add_metric,
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
_IN_SHELL: tuple[tuple[str, str, str | Callable[[re.Match[str]], str]], ...] = (
    ("input", r"Set program\.example_inputs\b", "Pass them"),
    ("input", r"\bexample_inputs\b", "example inputs (--input 1,3,224,224)"),
    ("statistics", r"fxfact\.Statistics and held_out=batches", "--statistics FILE and --calibration DATA"),
    ("calibration", r"\bcalibration=batches\b", "--calibration DATA"),
    ("calibration", r"\bcalibration(=|(?=:))|(?<=as )calibration\b|(?<=[Pp]ass )calibration\b", "--calibration"),
    ("calibration", r"smaller batches", "smaller batches (--batch N)"),
    ("likelihood", r"\blikelihood=(?=[\s.,])", "--likelihood categorical or gaussian"),
    ("macs", r"(?:budget=)?fxfact\.(Macs|Params|Latency|Loss)\(([\d.]+)\)", lambda m: f"--{m[1].lower()} {m[2]}"),
    ("at_most_drop", r"\bat_most_drop\b", "--at-most-drop"),
    ("at_most_drop", r"\bevaluate (?=raised|returned|changed|is random)", "--metric "),
    ("fold_weights", r"\bfold_weights=True\b", "--fold-weights"),
    ("progress", r"\bprogress=True\b", "--progress"),
    ("multiple_of", r"\bmultiple_of\b", "--multiple-of"),
    ("max_samples", r"\bmax_samples\b", "--max-samples"),
    ("include", r"\bleave joint out\b", "remove --joint"),
    ("include", r"^(include|exclude|kinds|joint|factorization|likelihood|rank)(?=:| must)", r"--\1"),
)  # the option of a command, how a message names it in Python, and how it is written in the shell
_ONLY_IN_PYTHON = ("capture=", "leaf_modules", "transform=", "weights='empty'", "generator=", "allow_growth")


class _Command(NamedTuple):
    name: str
    arguments: str
    help: str
    example: str
    add_arguments: tuple[Callable[[argparse.ArgumentParser], None], ...]


_CHOICES = (add_budget, add_metric, add_data, add_scope)
_COMMANDS = (
    _Command("inspect", "MODEL", "list every convolution and linear layer of a network", "resnet.pt2", (add_model,)),
    _Command(
        "plan",
        "MODEL",
        "choose a factorization and a rank for every layer",
        "resnet.pt2 --macs 0.5 --calibration images.npy -o plan.json",
        (add_model, add_plan_output, *_CHOICES, add_computation),
    ),
    _Command(
        "compress",
        "MODEL -o FILE",
        "factorize a network, check the result and write it",
        "resnet.pt2 -o small.pt2 --macs 0.5 --calibration images.npy",
        (add_model, add_compress_output, *_CHOICES, add_computation),
    ),
    _Command(
        "verify",
        "A B",
        "compare a factorized network with its original",
        "resnet.pt2 small.pt2",
        (add_two_models, add_tolerance),
    ),
    _Command(
        "bench",
        "A B",
        "time two networks side by side",
        "resnet.pt2 small.pt2 --threads 1",
        (add_two_models, add_timing),
    ),
    _Command(
        "report",
        "A B",
        "show the changes in a network, their savings and their costs",
        "resnet.pt2 small.pt2 -o report.html",
        (add_two_models, add_report_output),
    ),
    _Command(
        "demo",
        "",
        "train, factorize and compare a small network on handwritten digits (a minute)",
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
    args = build_parser().parse_args(arguments)
    try:
        with _warnings_as_messages(args):
            commands = importlib.import_module("fxfact.cli.commands")  # only now: PyTorch takes seconds to import
            status: int = getattr(commands, args.command)(args)
        sys.stdout.flush()
        return status
    except FxfactError as error:
        print(f"fxfact: {in_shell_words(str(error), args)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader closed the pipe, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


@contextmanager
def _warnings_as_messages(args: Arguments) -> Iterator[None]:
    """Print warnings without the line of code that issued them, and none about code of the future."""

    def as_message(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return f"fxfact: warning: {in_shell_words(str(message), args)}\n"

    usual = warnings.formatwarning
    warnings.formatwarning = as_message
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        warnings.formatwarning = usual


def in_shell_words(message: str, args: Arguments) -> str:
    """Replace the arguments of the Python API that a message names by the options of this command."""
    for option, pattern, written in _IN_SHELL:
        if hasattr(args, option):
            message = re.sub(pattern, written, message)
    python = [name for name in _ONLY_IN_PYTHON if name in message]
    return f"{message} ({', '.join(python)} can only be passed in Python.)" if python else message


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="fxfact",
        description="Factorize the convolutions and linear layers of a trained network.",
        epilog=_EXIT_STATUS,
    )
    parser.add_argument("--version", action="version", version=f"fxfact {metadata.version('fxfact')}")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in _COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            usage=f"fxfact {command.name} {command.arguments} [options]".replace("  ", " "),
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=f"example: fxfact {command.name} {command.example}",
        )
        subparser.set_defaults(command=command.name)
        for add_arguments in command.add_arguments:
            add_arguments(subparser)
    return parser
