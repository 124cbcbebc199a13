"""torch.fx, and nothing of the mathematics: find a graph's convolutions, put chains in their place."""

from fxfact.graph.base import GraphSite, get_tensor, shape_of, weight_at
from fxfact.graph.contract import check_contract
from fxfact.graph.fold import fold_computed_weights
from fxfact.graph.fuse import fold_batch_norms, merge_pointwise
from fxfact.graph.lift import Factor, Lifted, lift, lower
from fxfact.graph.match import Match, match
from fxfact.graph.shapes import MacCounter, macs_by_node, record_macs, record_shapes, refresh_shapes
from fxfact.graph.splice import splice

__all__ = [
    "Factor",
    "GraphSite",
    "Lifted",
    "MacCounter",
    "Match",
    "check_contract",
    "fold_batch_norms",
    "fold_computed_weights",
    "get_tensor",
    "lift",
    "lower",
    "macs_by_node",
    "match",
    "merge_pointwise",
    "record_macs",
    "record_shapes",
    "refresh_shapes",
    "shape_of",
    "splice",
    "weight_at",
]
