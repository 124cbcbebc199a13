"""A plan carried out: on a graph, or by swapping modules."""

from fxfact.passes.apply import apply_plan, capture_as_planned
from fxfact.passes.decomposition import Decomposed, DecomposeOptions, Weights, decompose
from fxfact.passes.factorize_convs import FactorizeConvs
from fxfact.passes.history import PassRecord, last_plan, pass_history, set_history, update_plan
from fxfact.passes.inference_passes import (
    ChannelsLast,
    FoldBatchNorms,
    MergePointwise,
    OneDNN,
    PointwiseLinear,
    run_passes,
)

__all__ = [
    "ChannelsLast",
    "DecomposeOptions",
    "Decomposed",
    "FactorizeConvs",
    "FoldBatchNorms",
    "MergePointwise",
    "OneDNN",
    "PassRecord",
    "PointwiseLinear",
    "Weights",
    "apply_plan",
    "capture_as_planned",
    "decompose",
    "last_plan",
    "pass_history",
    "run_passes",
    "set_history",
    "update_plan",
]
