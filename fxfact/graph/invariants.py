"""The invariants of a graph that every pass relies on, checked before and after each pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxfact.errors import ArgumentTypeError, GraphError
from fxfact.graph.base import GraphSite, conv_input, output_size_of, shape_of
from fxfact.graph.match import Match, match


def check_invariants(graph_module: fx.GraphModule, when: str, sites: Sequence[GraphSite] | None = None) -> None:
    """Check that a pass can work on a graph.

    The invariants are:

    - The graph is well formed. Every module and tensor that it names exists (``Graph.lint``).
    - The graph module was recompiled after the last change of the graph.
    - If shapes are recorded, the output shape of a convolution follows from its input shape.

    Args:
        graph_module: the graph to check.
        when: the occasion, for the error message, such as "after FactorizeConvs".
        sites: the convolutions of the graph, if the caller knows them. By default the graph is matched to find them.

    Raises:
        ArgumentTypeError: if it is no graph module.
        GraphError: at the first violation.
    """
    _check_well_formed(graph_module, when)
    _check_shapes(match(graph_module).sites if sites is None else sites, when)


def checked_match(graph_module: fx.GraphModule, when: str) -> Match:
    """Check the invariants of a graph and return the match that the check needed. Raises GraphError."""
    _check_well_formed(graph_module, when)
    found = match(graph_module)
    _check_shapes(found.sites, when)
    return found


def _check_well_formed(graph_module: fx.GraphModule, when: str) -> None:
    if not isinstance(graph_module, fx.GraphModule):
        raise ArgumentTypeError(
            f"{when}: expected a torch.fx.GraphModule, got {type(graph_module).__name__}. Pass "
            "torch.fx.symbolic_trace(model), or call fxfact.apply(plan, model)."
        )
    try:
        graph_module.graph.lint()
    except (RuntimeError, AttributeError) as error:
        raise GraphError(f"{when}: the graph is not well formed: {error}") from error
    if graph_module.graph.python_code("self").src != graph_module.code:
        raise GraphError(f"{when}: the graph was changed but not recompiled. Call graph_module.recompile().")


def _check_shapes(sites: Sequence[GraphSite], when: str) -> None:
    for site in sites:
        spec = site.spec
        for node in site.nodes:
            before, after = shape_of(conv_input(node)), shape_of(node)
            if before is None or after is None or output_size_of(node) is not None:
                continue
            expected = spec.output_shape(before)
            if after != expected:
                raise GraphError(f"{when}: {node.name} records shape {after}, but {spec} gives {expected}")
