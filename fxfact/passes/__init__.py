"""What carries a plan out: on a graph, or on a model that keeps its own Python."""

from fxfact.passes.base import Applied, applied, last_plan, record_all, record_plan
from fxfact.passes.carrying_out import carry_out, recapture
from fxfact.passes.decomposing import Decomposed, Decomposing, Weights, decompose
from fxfact.passes.factorize_convs import FactorizeConvs
from fxfact.passes.for_inference import ChannelsLast, FoldBatchNorms, MergePointwise, OneDNN, PointwiseLinear, in_form

__all__ = [
    "Applied",
    "ChannelsLast",
    "Decomposed",
    "Decomposing",
    "FactorizeConvs",
    "FoldBatchNorms",
    "MergePointwise",
    "OneDNN",
    "PointwiseLinear",
    "Weights",
    "applied",
    "carry_out",
    "decompose",
    "in_form",
    "last_plan",
    "recapture",
    "record_all",
    "record_plan",
]
