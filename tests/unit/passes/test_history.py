"""The plans that passes record on a network."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import Tensor, fx, nn

import fxfact
from fxfact.capture import capture
from fxfact.errors import PlanError
from fxfact.passes import PassRecord, last_plan, pass_history, set_history, update_plan
from fxfact.passes.history import add_record, log_pass
from tests.support import Small


@pytest.fixture
def plan(small: Small) -> fxfact.Plan:
    return fxfact.plan(small)


def test_history_lists_the_plans_oldest_first(small: Small, plan: fxfact.Plan) -> None:
    other = plan.edited("first", skip="dense")
    assert pass_history(small) == ()
    add_record(small, PassRecord(plan, {"first": 0.5}))
    add_record(small, PassRecord(other, {"second": None}))
    assert [record.plan for record in pass_history(small)] == [plan, other]
    assert [dict(record.relative_error) for record in pass_history(small)] == [{"first": 0.5}, {"second": None}]
    assert last_plan(small) == fxfact.plan_of(small) == other
    set_history(small, ())
    assert pass_history(small) == ()


def test_history_is_kept_by_copies_pickles_and_programs(small: Small, image: Tensor, plan: fxfact.Plan) -> None:
    for network in (small, capture(small, None).network):
        add_record(network, PassRecord(plan, {}))
        copied = copy.deepcopy(network)
        for other in (copied, pickle.loads(pickle.dumps(network)), pickle.loads(pickle.dumps(copied))):
            assert last_plan(other) == plan
    program = torch.export.export(small, (image,))
    set_history(program.graph_module, pass_history(small))
    assert last_plan(program) == plan


def test_history_of_a_copy_is_its_own(small: Small, plan: fxfact.Plan) -> None:
    traced = fx.symbolic_trace(small)
    add_record(traced, PassRecord(plan, {}))
    copied = copy.deepcopy(traced)
    add_record(copied, PassRecord(plan.edited("first", skip="dense"), {}))
    assert (len(pass_history(traced)), len(pass_history(copied))) == (1, 2)


def test_network_without_a_plan_is_told(small: Small) -> None:
    for call in (last_plan, fxfact.plan_of):
        with pytest.raises(PlanError, match=r"Small was not made by a plan. fxfact.factorize returns one"):
            call(small)


def test_update_plan_changes_only_the_last_plan(small: Small, plan: fxfact.Plan) -> None:
    update_plan(small, measured_ms=(2.0, 1.0))  # there is none to change
    assert pass_history(small) == ()
    add_record(small, PassRecord(plan, {"first": 0.5}))
    add_record(small, PassRecord(plan, {"first": 0.25}))
    update_plan(small, measured_ms=(2.0, 1.0))
    first, last = pass_history(small)
    assert (first.plan.measured_ms, last.plan.measured_ms) == (None, (2.0, 1.0))
    assert (first.relative_error, last.relative_error) == ({"first": 0.5}, {"first": 0.25})


def test_plan_is_logged_when_a_pass_applies_it(
    small: Small, plan: fxfact.Plan, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fxfact"):
        fxfact.apply(plan, small)
        log_pass("AnotherPass", plan, nn.Sequential())
    assert [text.splitlines()[0] for text in caplog.messages] == ["FactorizeConvs applied:", "AnotherPass applied:"]
    assert all("2 of 3 rewritten" in text for text in caplog.messages)
