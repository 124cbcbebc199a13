"""The names that users see as those of ``fxfact``, which imports this module when the first of them is used."""

from fxfact import factorizations, nn, passes
from fxfact.analysis import Diff, Report, Verification, diff, inspect, report, to_dot, verify
from fxfact.api import apply, calibrate, factorize, plan, plan_of
from fxfact.calibration import Likelihood, Statistics
from fxfact.compile_backend import backend
from fxfact.conv import ConvChain, ConvLayer, ConvSpec, compose, run
from fxfact.errors import FxfactError
from fxfact.finetune import DistillResult, RefitResult, distill, refit
from fxfact.planning import Decision, ErrorCurveCache, Latency, Loss, Macs, Metric, Params, Plan, Speedup
from fxfact.planning import rank_rules as ranks
from fxfact.search import for_inference
from fxfact.serialization import load, save

__all__ = [
    "ConvChain",
    "ConvLayer",
    "ConvSpec",
    "Decision",
    "Diff",
    "DistillResult",
    "ErrorCurveCache",
    "FxfactError",
    "Latency",
    "Likelihood",
    "Loss",
    "Macs",
    "Metric",
    "Params",
    "Plan",
    "RefitResult",
    "Report",
    "Speedup",
    "Statistics",
    "Verification",
    "apply",
    "backend",
    "calibrate",
    "compose",
    "diff",
    "distill",
    "factorizations",
    "factorize",
    "for_inference",
    "inspect",
    "load",
    "nn",
    "passes",
    "plan",
    "plan_of",
    "ranks",
    "refit",
    "report",
    "run",
    "save",
    "to_dot",
    "verify",
]
