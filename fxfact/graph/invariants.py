"""What every pass may rely on in a graph, checked before and after each."""

from __future__ import annotations

from torch import fx

from fxfact.errors import GraphError
from fxfact.graph.base import conv_input, shape_of
from fxfact.graph.match import match


def check_invariants(graph_module: fx.GraphModule, when: str) -> None:
    """Raise GraphError, naming the first breach, unless

    - the graph is well formed, and every module and tensor it names is there (``Graph.lint``);
    - the code that runs is the graph's own, not that of an earlier graph;
    - a shape recorded behind a convolution is the one that it gives for the shape recorded before it.
    """
    try:
        graph_module.graph.lint()
    except (RuntimeError, AttributeError) as error:
        raise GraphError(f"{when}: the graph is not well formed: {error}") from error
    if graph_module.graph.python_code("self").src != graph_module.code:
        raise GraphError(f"{when}: the graph was changed but not recompiled. Call graph_module.recompile().")
    for site in match(graph_module).sites:
        spec = site.spec
        for node in site.nodes:
            before, after = shape_of(conv_input(node)), shape_of(node)
            if before is None or after is None:
                continue
            expected = (*before[: -spec.order - 1], spec.out_channels, *spec.output_size(before[-spec.order :]))
            if after != expected:
                raise GraphError(f"{when}: {node.name} records shape {after}, but {spec} gives {expected}")
