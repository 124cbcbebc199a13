"""The command line: ``fxfact``, or ``python -m fxfact``."""

from fxfact.cli.parsing import main

__all__ = ["main"]
