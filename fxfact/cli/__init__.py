"""The command line: ``fxfact``, or ``python -m fxfact``."""

from fxfact.cli.parser import main

__all__ = ["main"]
