"""Passes over a graph module, each usable in torch's own PassManager."""

from fxfact.passes.base import Applied, applied, record
from fxfact.passes.factorize_convs import FactorizeConvs, Weights

__all__ = ["Applied", "FactorizeConvs", "Weights", "applied", "record"]
