"""A plan carried out: on a graph, or by swapping modules."""

from fxfact.passes.apply import apply_plan, capture_as_planned
from fxfact.passes.decomposition import (
    DecomposeJob,
    DecomposeOptions,
    Decomposition,
    Weights,
    decompose_layer,
    decompose_sites,
)
from fxfact.passes.factorize_convs import FactorizeConvs
from fxfact.passes.history import PassRecord, last_plan, pass_history, set_history, update_plan
from fxfact.passes.inference_passes import (
    INFERENCE_PASSES,
    MODULE_PASSES,
    ChannelsLast,
    FoldBatchNorms,
    InferencePass,
    MergePointwise,
    OneDNN,
    PointwiseLinear,
    can_be_linear,
    can_be_onednn,
    linear_passes,
    run_passes,
)
from fxfact.passes.pass_manager import PassManager

__all__ = [
    "INFERENCE_PASSES",
    "MODULE_PASSES",
    "ChannelsLast",
    "DecomposeJob",
    "DecomposeOptions",
    "Decomposition",
    "FactorizeConvs",
    "FoldBatchNorms",
    "InferencePass",
    "MergePointwise",
    "OneDNN",
    "PassManager",
    "PassRecord",
    "PointwiseLinear",
    "Weights",
    "apply_plan",
    "can_be_linear",
    "can_be_onednn",
    "capture_as_planned",
    "decompose_layer",
    "decompose_sites",
    "last_plan",
    "linear_passes",
    "pass_history",
    "run_passes",
    "set_history",
    "update_plan",
]
