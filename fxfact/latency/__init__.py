"""How long convolutions and chains take on this machine: measured side by side, kept in a file."""

from fxfact.latency.clock import Clock, Layout
from fxfact.latency.kept import Kept, machine

__all__ = ["Clock", "Kept", "Layout", "machine"]
