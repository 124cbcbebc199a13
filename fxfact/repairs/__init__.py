"""Repairs in closed form: every chain is made to give what its convolution gave, on the inputs that it really gets."""

from fxfact.repairs.base import Repair, repair

__all__ = ["Repair", "repair"]
