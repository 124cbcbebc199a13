"""The command line: ``fxfact``, or ``python -m fxfact``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fxfact.demo import run_demo
from fxfact.errors import FxfactError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 where it succeeded, 1 where it could not, 2 where the arguments are wrong."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except FxfactError as error:
        print(f"fxfact: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxfact", description="Factorize the convolutions of a trained network.")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train, factorize and compare a small network on handwritten digits (about 20 s)",
        epilog="example: fxfact demo --factorization cp --rank 0.5",
    )
    demo.add_argument("--factorization", default="tucker", help="a name, or several by comma (default: %(default)s)")
    demo.add_argument("--rank", type=_rank, default=0.25, help="a fraction, an int or 'same' (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo.add_argument("--epochs", type=_positive, default=10, help="of training (default: %(default)s)")
    demo.set_defaults(run=_demo)
    return parser


def _demo(given: argparse.Namespace) -> None:
    names = given.factorization.split(",")
    request = names if len(names) > 1 else names[0]
    run_demo(request, given.rank, seed=given.seed, epochs=given.epochs, say=print, progress=_progress)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def _rank(text: str) -> int | float | str:
    if text == "same":
        return text
    return float(text) if "." in text or "e" in text.lower() else int(text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
