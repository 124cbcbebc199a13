"""Factorizes the convolutions and linear layers of trained PyTorch networks, with a compiler pass on torch.fx graphs.

The rooms of the package, top down. Imports go strictly down as well, except that ``factorizations`` and ``graph`` do
not know each other:

    cli              the shell: commands, their arguments, the demo
    serialization    networks and programs in files: written whole or not at all, read without executing anything
    api              the functions that a user calls: factorize, plan, apply, calibrate, plan_of
    finetune         brings a factorized network nearer to its original: refit (closed form), distill (training)
    search           plans that must be measured, on data or by the clock: propose a plan, measure it, decide
    analysis         verification, inspection, reports
    compile_backend  torch.compile(model, backend="fxfact")
    passes           applies a plan: to a graph, or by swapping modules
    planning         from a request or a budget to a plan: budgets, rank rules, error curves, allocation
    calibration      from unlabelled data to statistics: the Fisher information of every layer
    capture          makes a model rewritable: traced, by its modules, or exported; each is compared with the model
    transduction     a network for images becomes one for videos
    nn               factorized layers: CPConv, TuckerConv, TTConv
    graph            torch.fx only: recognises convolutions and linear layers (graph/match.py), splices chains, folds
    factorizations   (convolution, rank) -> chain of convolutions; linear algebra; knows no graph
    conv             convolutions as values, modules and functions; chains, costs, the Fisher metric of a layer
    utils            timing, progress, executors, copies, files: no knowledge of convolutions
    errors           the errors, all of them FxfactError
"""

from fxfact import factorizations, nn, passes
from fxfact.analysis import Report, Verification, diff, inspect, report, to_dot, verify
from fxfact.api import apply, calibrate, factorize, plan, plan_of
from fxfact.calibration import Likelihood, Statistics
from fxfact.compile_backend import backend
from fxfact.conv import ConvChain, ConvLayer, ConvSpec, compose, run
from fxfact.errors import FxfactError
from fxfact.finetune import DistillResult, RefitResult, distill, refit
from fxfact.planning import Decision, ErrorCurveCache, Latency, Loss, Macs, Params, Plan
from fxfact.planning import rank_rules as ranks
from fxfact.search import for_inference
from fxfact.serialization import load, save
from fxfact.transduction import transduct

__all__ = [
    "ConvChain",
    "ConvLayer",
    "ConvSpec",
    "Decision",
    "DistillResult",
    "ErrorCurveCache",
    "FxfactError",
    "Latency",
    "Likelihood",
    "Loss",
    "Macs",
    "Params",
    "Plan",
    "RefitResult",
    "Report",
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
    "transduct",
    "verify",
]
