"""fxfact factorizes the convolutions of a trained network, by a compiler pass on its torch.fx graph."""

from fxfact import factorizations, nn, passes
from fxfact.api import apply, factorize, plan, plan_of
from fxfact.conv import ConvChain, ConvLayer, ConvSpec, compose, run
from fxfact.errors import FxfactError
from fxfact.inspection import diff, inspect
from fxfact.planning import Decision, Plan

__all__ = [
    "ConvChain",
    "ConvLayer",
    "ConvSpec",
    "Decision",
    "FxfactError",
    "Plan",
    "apply",
    "compose",
    "diff",
    "factorizations",
    "factorize",
    "inspect",
    "nn",
    "passes",
    "plan",
    "plan_of",
    "run",
]
