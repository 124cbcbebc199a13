"""The pass FactorizeConvs, on graphs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

import fxfact
from fxfact.errors import PlanError
from fxfact.passes import FactorizeConvs
from tests.support import Small


def test_pass_runs_in_the_pass_manager_of_torch(small: Small, image: Tensor) -> None:
    plan, traced = fxfact.plan(small, "tt"), fx.symbolic_trace(small)
    code = traced.code
    manager = PassManager(passes=[FactorizeConvs(plan)], constraints=[], steps=5)
    result = manager(traced)
    assert result.modified
    assert traced.code == code
    assert result.graph_module(image).equal(fxfact.apply(plan, small)(image))
    again = FactorizeConvs(plan)(result.graph_module)
    assert not again.modified
    assert again.graph_module is result.graph_module


def test_pass_with_a_plan_without_rewrites_returns_its_input(small: Small) -> None:
    traced = fx.symbolic_trace(small)
    result = FactorizeConvs(fxfact.plan(small, exclude="*"))(traced)
    assert not result.modified
    assert result.graph_module is traced
    left = fxfact.factorize(small, exclude="*")
    assert fxfact.plan_of(left).rewrites == ()
    assert left.first.weight.data_ptr() != small.first.weight.data_ptr()


def test_pass_refuses_a_graph_that_the_plan_does_not_fit(small: Small) -> None:
    other = nn.Sequential(nn.Conv2d(4, 8, 3))
    with pytest.raises(PlanError, match=r"first: the plan has Conv2d\(4→8"):
        FactorizeConvs(fxfact.plan(small))(fx.symbolic_trace(other))


def test_plan_for_untied_weights_does_not_fit_tied_weights() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))

    tied = model()
    tied[1].weight = tied[0].weight
    with pytest.raises(PlanError, match="and the weight of 0"):
        fxfact.apply(fxfact.plan(model(), exclude="0"), tied)


def test_pass_result_shares_no_memory_with_the_original(small: Small, image: Tensor) -> None:
    before = {name: value.clone() for name, value in small.state_dict().items()}
    result = fxfact.factorize(small, rank=0.4, example_inputs=image)
    with torch.no_grad():
        for tensor in (*result.parameters(), *result.buffers()):
            tensor.zero_()
    assert all(value.equal(before[name]) for name, value in small.state_dict().items())


def test_pass_result_can_be_copied_and_pickled(small: Small, image: Tensor) -> None:
    result = fxfact.factorize(small, "cp", example_inputs=image)
    copied = copy.deepcopy(result)
    for other in (copied, *(pickle.loads(pickle.dumps(each)) for each in (result, copied))):
        assert other(image).equal(result(image))
        assert fxfact.plan_of(other) == fxfact.plan_of(result)
