"""fxfact factorizes the convolutions of a trained network, by a compiler pass on its torch.fx graph.

The way of the data, top down, which is also the way of the imports::

    cli                      what a user calls from a shell
    demo                     a network trained, factorized and compared: fxfact demo
    files                    networks written and read
    api                      what a user calls
    repairs, recovery        a factorized network brought nearer to its original, without labels
    pairs                    both side by side on the same data
    reporting                both shown: text, JSON, a page with pictures
    inspection               graphs, shown
    compile_backend          torch.compile(model, backend="fxfact")
    choosing                 the plan for a budget: the one foreseen, or one that measures clearly better
    trying, rehearsing       plans for a loss tried on data; for a time, before anything is decomposed
    inference                the fastest form of a network, by measurement
    verification             is a rewritten network right?
    passes                   a plan carried out: on a graph, or on the model's own modules
    planning                 what is to be done: values to print, edit and save
    ranks, nn                which rank for which convolution; factorized layers
    latency                  how long convolutions and chains take on this machine
    calibration              what data say of a network: which errors its loss can bear
    capture                  a model becomes rewritable: traced, by its modules, or exported
    graph                    torch.fx only: match, fold, splice
    factorizations           (convolution, rank) -> chain; knows no graph
    sites, stand_ins         where a convolution is; what takes its place in a model's own Python
    folding                  weights computed from others become parameters
    conv_modules, spellings  modules and functions of PyTorch's <-> conv
    metric                   what an error of a kernel costs the loss; chains fitted to that
    cost                     parameters and MACs
    copying, comparing       private copies of models; how far apart two outputs are
    conv, tensor             convolutions and chains as values; decompositions of plain tensors
    kernels                  convolutions computed in other ways: as matrix products, by oneDNN
    executing, progress      long work: on the caller's executor, and shown
    timing, activations      how long calls take, and how much memory
    writing                  files that are whole or not there
    precision                single precision as it is written
    errors, skip             how "no" is said
"""

from fxfact import factorizations, nn, passes
from fxfact.analysis import Report, Verification, diff, inspect, report, to_dot, verify
from fxfact.api import apply, calibrate, factorize, plan, plan_of
from fxfact.calibration import Statistics
from fxfact.compile_backend import backend
from fxfact.conv import ConvChain, ConvLayer, ConvSpec, compose, run
from fxfact.errors import FxfactError
from fxfact.finetune import DistillResult, RefitResult, distill, refit
from fxfact.planning import VBMF, Decision, Energy, LargestThatPays, Latency, Loss, Macs, Params, Plan
from fxfact.search import for_inference
from fxfact.serialization import load, save

__all__ = [
    "VBMF",
    "ConvChain",
    "ConvLayer",
    "ConvSpec",
    "Decision",
    "DistillResult",
    "Energy",
    "FxfactError",
    "LargestThatPays",
    "Latency",
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
    "refit",
    "report",
    "run",
    "save",
    "to_dot",
    "verify",
]
