"""Turns a network for images into one for videos, which at first maps every frame as before."""

from fxfact.transduction.network import transduct

__all__ = ["transduct"]
