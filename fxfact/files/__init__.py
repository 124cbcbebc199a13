"""Factorized networks in files: written whole or not at all, read without executing anything."""

from fxfact.files.doors import load, save

__all__ = ["load", "save"]
