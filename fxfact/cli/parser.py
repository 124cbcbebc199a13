"""What can be typed."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata

import torch
from torch import Tensor

from fxfact.cli import commands
from fxfact.errors import FxfactError

_Add = Callable[[argparse.ArgumentParser], None]
_MODEL = "a .pt2 file, or package.module:callable, which gives a torch.nn.Module"
_EXIT = (
    "exit codes: 0 done, 1 it could not be (the message says why), 2 not understood, 3 verify found a difference, "
    "130 interrupted, 141 nobody read what was printed"
)
_SPELLED = {"example_inputs": "--input 1,3,224,224", "statistics=": "--statistics FILE", "calibration": "--calibration"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 where it succeeded, 1 where it could not, 2 where it is not understood, 3 where networks that
    were compared are different.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal has arrows
    given = _parser().parse_args(arguments)
    try:
        code: int = given.run(given)
        sys.stdout.flush()
        return code
    except FxfactError as error:
        spelled = [f"{name.rstrip('=')} is {option}" for name, option in _SPELLED.items() if f" {name}" in str(error)]
        print(f"fxfact: {error}" + (f" (Here {', '.join(spelled)}.)" if spelled else ""), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxfact", description="Factorize the convolutions of a trained network.", epilog=_EXIT
    )
    parser.add_argument("--version", action="version", version=f"fxfact {metadata.version('fxfact')}")
    adding = parser.add_subparsers(required=True, metavar="command")
    for name, run, words, example, add_all in _commands():
        command = adding.add_parser(name, help=words, description=words, epilog=f"example: fxfact {name} {example}")
        command.set_defaults(run=run)
        for add in add_all:
            add(command)
    return parser


def _commands() -> list[tuple[str, Callable[[argparse.Namespace], int], str, str, list[_Add]]]:
    """Of each its name, what it does, that in words, an example, and what it takes."""
    return [
        ("inspect", commands.inspect, "show every convolution of a network", "resnet.pt2", [_add_model]),
        (
            "plan", commands.plan, "decide what every convolution becomes",
            "resnet.pt2 --macs 0.5 --calibration images.npy -o plan.json", [_add_model, _add_choice, _add_plan],
        ),
        (
            "compress", commands.compress, "factorize a network, check it and write it",
            "resnet.pt2 -o small.pt2 --macs 0.5 --calibration images.npy", [_add_model, _add_choice, _add_compress],
        ),
        (
            "verify", commands.verify, "compare a factorized network with its original", "resnet.pt2 small.pt2",
            [_add_two, _add_verify],
        ),
        (
            "bench", commands.bench, "time two networks side by side", "resnet.pt2 small.pt2 --threads 1",
            [_add_two, _add_bench],
        ),
        (
            "report", commands.report, "show what was done to a network, what it saves and what it costs",
            "resnet.pt2 small.pt2 -o report.html", [_add_two, _add_report],
        ),
        (
            "demo", commands.demo, "train, factorize and compare a small network on handwritten digits (about 20 s)",
            "--factorization cp --rank 0.5", [_add_demo],
        ),
    ]  # fmt: skip


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", help="the plan's file")
    parser.add_argument(
        "--keep-statistics",
        metavar="FILE",
        help="write the statistics of the data, to plan with again; the plan is then made of them alone",
    )


def _add_compress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", required=True, help="NAME.pt2, a program, or NAME.pt, weights for fxfact.load"
    )
    parser.add_argument("--plan", help="the file of a plan to carry out, instead of deciding")
    parser.add_argument(
        "--dynamic-batch", action="store_true", help="of a module made a program: any number of samples"
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tolerance", type=float, help="the largest relative difference of outputs that is near enough"
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", help="NAME.html, a page with pictures, or NAME.json")
    parser.add_argument("--threads", type=_positive, help="default: as many as PyTorch takes")
    parser.add_argument("--progress", action="store_true", help="bars on stderr (needs tqdm)")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_positive, help="default: as many as PyTorch takes")
    parser.add_argument("--repeats", type=_positive, default=15, help="default: %(default)s")
    parser.add_argument("--number", type=_positive, default=5, help="of runs a repeat (default: %(default)s)")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--factorization", type=_names, default="tucker", help="a name, or several by comma (default: %(default)s)"
    )
    parser.add_argument("--rank", type=_rank, default=0.25, help="a fraction, an int or 'same' (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--epochs", type=_positive, default=10, help="of training (default: %(default)s)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL)
    parser.add_argument("--weights", help="the file of a state_dict for package.module:callable")
    _add_input(parser)


def _add_two(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="A", help=f"the original: {_MODEL}")
    parser.add_argument("other", metavar="B", help="the other one, given alike")
    parser.add_argument("--weights", help="the file of A's state_dict")
    parser.add_argument("--other-weights", help="the file of B's state_dict")
    _add_input(parser)


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", type=_input, action="append", metavar="SIZES",
        help="the shape of an input, such as 1,3,224,224, which is then normal numbers; once for each; of token ids, "
        "then zeros, 1,77:int64",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--import", dest="imported", type=_imported, action="append", metavar="PACKAGE",
        help="import it first: the one that a .pt2 file's outputs are of, such as transformers.modeling_outputs",
    )  # fmt: skip


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--factorization", type=_names, help="a name, or several by comma (default: tucker; budgets: all)"
    )
    parser.add_argument(
        "--rank", type=_rank, help="a fraction of each convolution's parameters, an int or 'same' (default: 0.5)"
    )
    parser.add_argument("--macs", type=float, metavar="SHARE", help="budget: of the network's multiply-accumulates")
    parser.add_argument("--params", type=float, metavar="SHARE", help="budget: of the network's parameters")
    parser.add_argument(
        "--latency", type=float, metavar="SHARE", help="budget: of the network's fastest time here (of a .pt2 as it is)"
    )
    parser.add_argument(
        "--loss", type=float, metavar="NATS", help="budget: by how much the loss may grow, on every fourth batch"
    )
    parser.add_argument("--calibration", metavar="DATA", help="samples: a .npy file (first axis), or a folder of them")
    parser.add_argument("--batch", type=_positive, default=64, help="samples at once (default: %(default)s)")
    parser.add_argument("--likelihood", choices=["categorical", "gaussian"], help="what the output means")
    parser.add_argument(
        "--statistics", metavar="FILE", help="of data, kept from an earlier plan; --calibration is then to measure on"
    )
    parser.add_argument("--multiple-of", type=_positive, help="ranks are (default: 1; for --latency 32, 16 or 8)")
    parser.add_argument("--include", action="append", metavar="GLOB", help="only these paths; may be repeated")
    parser.add_argument("--exclude", action="append", metavar="GLOB", help="not these paths; may be repeated")
    parser.add_argument("--fold-weights", action="store_true", default=None, help="make computed weights parameters")
    parser.add_argument("--workers", type=_positive, default=1, help="processes of a thread each (default: this one)")
    parser.add_argument("--progress", action="store_true", help="bars on stderr (needs tqdm)")


def _names(text: str) -> str | list[str]:
    names = text.split(",")
    return names if len(names) > 1 else text


def _rank(text: str) -> int | float | str:
    if text == "same":
        return text
    try:
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a fraction such as 0.5, an integer, or same, got {text!r}") from None


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"an integer, at least 1, got {text!r}")
    return int(text)


def _imported(text: str) -> str:
    try:
        importlib.import_module(text)
    except Exception as error:  # whatever a package does
        raise argparse.ArgumentTypeError(f"{text} cannot be imported: {error}") from error
    return text


def _input(text: str) -> Tensor:
    sizes, _, kind = text.partition(":")
    shape = [_positive(size) for size in sizes.split(",")]
    dtype = getattr(torch, kind or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{kind} is no dtype of torch")
    draw = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=draw).to(dtype)
    return torch.zeros(shape, dtype=dtype)
