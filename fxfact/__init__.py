"""Factorizes the convolutions and linear layers of trained PyTorch networks, with a compiler pass on torch.fx graphs.

The rooms of the package, top down. Imports go strictly down as well, except that ``factorizations`` and ``graph`` do
not know each other:

    public           the names below, which ``fxfact`` itself has
    cli              the shell: commands, their arguments, the demo
    serialization    networks and programs in files: written whole or not at all, read without executing anything
    api              the functions that a user calls: factorize, plan, apply, calibrate, plan_of
    search           plans that must be measured, on data or by the clock: propose a plan, measure it, decide
    finetune         brings a factorized network nearer to its original: refit (closed form), distill (training)
    analysis         verification, inspection, reports
    compile_backend  torch.compile(model, backend="fxfact")
    passes           applies a plan: to a graph, or by swapping modules
    planning         from a request or a budget to a plan: budgets, rank rules, error curves, allocation
    calibration      from unlabelled data to statistics: the Fisher information of every layer
    capture          makes a model rewritable: traced, by its modules, or exported; each is compared with the model
    transduction     a network for images becomes one for videos
    nn               layers to build models with: CPConv, TuckerConv, TTConv, JointConv, attention of linear layers
    graph            torch.fx only: recognises convolutions and linear layers (graph/match.py), splices chains, folds
    factorizations   (convolution, rank) -> chain of convolutions; linear algebra; knows no graph
    conv             convolutions as values, modules and functions; chains, costs, the Fisher metric of a layer
    utils            timing, progress, executors, copies, files: no knowledge of convolutions
    errors           the errors, all of them FxfactError, and the warnings
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxfact.public import *  # noqa: F403 (its __all__)


def __getattr__(name: str) -> Any:
    """Import the public names when the first is used, because ``fxfact --version`` should not import PyTorch."""
    if not name.startswith("__") or name == "__all__":
        public = importlib.import_module("fxfact.public")
        globals().update({each: getattr(public, each) for each in public.__all__}, __all__=public.__all__)
    if name in globals():
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
