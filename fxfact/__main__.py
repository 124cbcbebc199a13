"""Runs the command line: ``python -m fxfact``."""

import sys

from fxfact.cli import main

sys.exit(main())
