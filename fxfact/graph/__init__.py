"""Reads and rewrites torch.fx graphs. Knows convolutions, but no factorizations."""

from fxfact.graph.base import GraphSite, get_tensor, weight_at, with_kernels
from fxfact.graph.constant_fold import fold_computed_weights
from fxfact.graph.fusion import fold_batch_norms, merge_pointwise
from fxfact.graph.invariants import check_invariants, checked_match
from fxfact.graph.lift import Factor, Lifted, lift, lower
from fxfact.graph.match import Match, match
from fxfact.graph.shape_prop import (
    MacCounter,
    macs_by_node,
    preserve_state,
    record_macs,
    record_shapes,
    refresh_shapes,
)
from fxfact.graph.splice import splice

__all__ = [
    "Factor",
    "GraphSite",
    "Lifted",
    "MacCounter",
    "Match",
    "check_invariants",
    "checked_match",
    "fold_batch_norms",
    "fold_computed_weights",
    "get_tensor",
    "lift",
    "lower",
    "macs_by_node",
    "match",
    "merge_pointwise",
    "preserve_state",
    "record_macs",
    "record_shapes",
    "refresh_shapes",
    "splice",
    "weight_at",
    "with_kernels",
]
