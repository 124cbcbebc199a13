"""The invariants that every pass relies on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxfact
from fxfact.capture import capture
from fxfact.errors import GraphError
from fxfact.graph import check_invariants, checked_match
from fxfact.passes import FactorizeConvs
from tests.support import Small


def test_invariants_are_checked(small: Small, image: Tensor) -> None:
    traced = capture(small, image).network
    node = next(node for node in traced.graph.nodes if node.target == "second")
    node.meta["tensor_meta"] = node.meta["tensor_meta"]._replace(shape=torch.Size([3, 12, 9, 9]))
    with pytest.raises(GraphError, match="second records shape"):
        FactorizeConvs(fxfact.plan(small))(traced)
    traced = capture(small).network
    traced.graph.erase_node(traced.graph.output_node())
    traced.graph.output(next(iter(traced.graph.nodes)))
    with pytest.raises(GraphError, match="recompile"):
        check_invariants(traced, "here")
    traced = capture(small).network
    next(node for node in traced.graph.nodes if node.target == "second").target = "third"
    with pytest.raises(GraphError, match=r"here: .*third"):
        check_invariants(traced, "here")


def test_known_sites_are_checked_without_another_match(
    small: Small, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = capture(small, image).network
    found = checked_match(traced, "here")
    assert [site.path for site in found.sites] == ["first", "second", "head"]
    monkeypatch.setattr("fxfact.graph.invariants.match", lambda graph_module: pytest.fail("matched again"))
    check_invariants(traced, "here", found.sites)
    found.sites[1].nodes[0].meta["tensor_meta"] = found.sites[0].nodes[0].meta["tensor_meta"]
    check_invariants(traced, "here", found.sites[:1])
    with pytest.raises(GraphError, match=r"here: second records shape \(3, 8, 10, 10\), but Conv2d\(8→12"):
        check_invariants(traced, "here", found.sites)


def test_first_match_is_checked_like_a_graph(small: Small, image: Tensor) -> None:
    traced = capture(small, image).network
    traced.graph.erase_node(traced.graph.output_node())
    traced.graph.output(next(iter(traced.graph.nodes)))
    with pytest.raises(GraphError, match="there: the graph was changed but not recompiled"):
        checked_match(traced, "there")
