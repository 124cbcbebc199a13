"""torch.fx, and nothing of the mathematics: capture a graph, find its convolutions, put chains in their place."""

from fxfact.graph.base import Captured, ConvSite, get_tensor, path_of, shape_of
from fxfact.graph.capture import ExampleInputs, arguments_of, bind_inputs, capture, copy_sharing
from fxfact.graph.contract import check_contract
from fxfact.graph.match import Match, match
from fxfact.graph.shapes import refresh_shapes
from fxfact.graph.splice import splice

__all__ = [
    "Captured",
    "ConvSite",
    "ExampleInputs",
    "Match",
    "arguments_of",
    "bind_inputs",
    "capture",
    "check_contract",
    "copy_sharing",
    "get_tensor",
    "match",
    "path_of",
    "refresh_shapes",
    "shape_of",
    "splice",
]
