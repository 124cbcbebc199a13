"""Recorded shapes and counted multiply-accumulates."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.shape_prop import ShapeProp

import fxfact
from fxfact.errors import CaptureError
from fxfact.graph import MacCounter, macs_by_node, preserve_state, record_macs, record_shapes
from fxfact.passes import FactorizeConvs
from tests.support import Small

MACS = 4 * 8 * 9 * 100 + 8 * 12 * 9 * 25 + 12 * 5  # of Small, for a sample of 4 x 10 x 10


def test_shapes_are_recorded_again_after_a_rewrite(small: Small, image: Tensor) -> None:
    for kind in ("tensor_meta", "val", "both"):
        traced = fx.symbolic_trace(small)
        if kind != "val":
            ShapeProp(traced).propagate(image)
        if kind != "tensor_meta":
            FakeTensorProp(traced, FakeTensorMode(allow_non_fake_inputs=True)).propagate(image)
        result = FactorizeConvs(fxfact.plan(small))(traced).graph_module
        truth = copy.deepcopy(result)
        ShapeProp(truth).propagate(image)
        for node, real in zip(result.graph.nodes, truth.graph.nodes, strict=True):
            for key in ("tensor_meta", "val"):
                assert (key in node.meta) == (kind in (key, "both")) or node.op in ("get_attr", "output")
                if key in node.meta and node.op != "output":
                    assert tuple(node.meta[key].shape) == tuple(real.meta["tensor_meta"].shape)


def test_shapes_are_not_recorded_if_the_placeholders_have_none(small: Small) -> None:
    result = fxfact.factorize(small)
    assert not any("tensor_meta" in node.meta or "val" in node.meta for node in result.graph.nodes)


def test_record_shapes_counts_macs_without_computing(small: Small, image: Tensor) -> None:
    traced = fx.symbolic_trace(small)
    assert record_shapes(traced, [image[:2]]) == 2 * MACS
    shapes = {node.name: tuple(node.meta["tensor_meta"].shape) for node in traced.graph.nodes if node.op != "output"}
    assert shapes["second"] == (2, 12, 5, 5)
    with pytest.raises(CaptureError, match=r"the network cannot run on example_inputs: .*Pass inputs that it accepts"):
        record_shapes(traced, [image[:, :2]])


def test_macs_are_counted_by_node(small: Small, image: Tensor) -> None:
    traced = fx.symbolic_trace(small)
    assert record_macs(traced, [image], {}) == 3 * MACS
    assert macs_by_node(traced) == {}  # the placeholder records no shape
    record_shapes(traced, [image])
    macs = {node.name: count // 3 for node, count in macs_by_node(traced).items() if count}
    assert macs == {"first": 4 * 8 * 9 * 100, "second": 8 * 12 * 9 * 25, "head": 12 * 5}


def test_mac_counter_ignores_the_gradients_of_convolutions(image: Tensor) -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1)
    with MacCounter() as counter:
        conv(image).sum().backward()
    assert counter.macs == 3 * 4 * 8 * 9 * 100


def test_preserve_state_restores_modes_and_buffers(small: Small) -> None:
    traced = fx.symbolic_trace(small.train())
    traced.norm.eval()
    traced.register_buffer("expanded", torch.zeros(1).expand(3))
    before = traced.norm.running_mean.clone()
    with preserve_state(traced):
        assert not any(module.training for module in traced.modules())
        traced.norm.running_mean.add_(1)
    assert traced.norm.running_mean.equal(before)
    assert (traced.training, traced.norm.training) == (True, False)
