"""The decision for one convolution: its stages, its cost, and its form in files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fxfact.conv import ConvSpec
from fxfact.errors import PlanError
from fxfact.factorizations import FACTORIZATIONS, Tucker
from fxfact.factorizations.matrix_svd import ChannelSVD
from fxfact.planning import Decision, summarize_reasons
from fxfact.planning.decision import decision_from_json, decision_to_json

SPEC = ConvSpec.parse(8, 12, (3, 3), padding=1, bias=True)
KNOWN = {kind.name: kind for kind in FACTORIZATIONS}


def test_decision_needs_a_convolution_and_a_rank_for_a_factorization() -> None:
    for incomplete in ({"spec": SPEC, "rank": (2,)}, {"spec": SPEC, "factorization": ChannelSVD()}):
        with pytest.raises(PlanError, match="a: a rewrite needs a convolution, a factorization and a rank"):
            Decision(path="a", **incomplete)
    with pytest.raises(PlanError, match="a rewrite needs"):
        Decision(path="a", spec=None, factorization=ChannelSVD(), rank=(2,))


def test_decision_knows_its_stages_and_costs() -> None:
    sizes = ((5, 5), (5, 5))
    rewritten = Decision(path="a", spec=SPEC, input_sizes=sizes, factorization=ChannelSVD(), rank=(4,))
    assert rewritten.stages == ChannelSVD().layout(SPEC, (4,))
    assert rewritten.before.params == 12 * 8 * 9 + 12
    assert rewritten.before.macs == 2 * 25 * 12 * 8 * 9  # two calls
    assert rewritten.after.params == 4 * 8 * 9 + 12 * 4 + 12
    assert rewritten.after.macs == 2 * 25 * (4 * 8 * 9 + 12 * 4)
    assert (rewritten.before.ms, rewritten.after.ms) == (None, None)
    dense = Decision(path="a", spec=SPEC, reason="because")
    assert dense.stages == (SPEC,)
    assert dense.before == dense.after
    assert dense.after.macs is None
    unparsed = Decision(path="a", spec=None, reason="because")
    assert (unparsed.stages, unparsed.before.params) == ((), 0)


def test_decision_for_a_shared_weight_does_not_count_its_parameters_again() -> None:
    tied = Decision(path="b", spec=SPEC, tied_to="a", factorization=ChannelSVD(), rank=(4,))
    assert (tied.before.params, tied.after.params) == (12, 12)  # the bias


def test_decision_counts_shared_stages_once() -> None:
    first, other = (
        Decision(path=path, spec=SPEC, shares_with="a", factorization=ChannelSVD(), rank=(4,)) for path in ("a", "b")
    )
    alone = replace(first, shares_with=None)
    assert first.after == alone.after
    assert other.after.params == alone.after.params - 4 * 8 * 9  # the first stage
    assert other.before == alone.before
    assert len({first.rewrite, other.rewrite, alone.rewrite}) == 3
    assert (first.remark, other.remark) == ("its joint set shares 1 stage", "shares 1 stage with a")
    with pytest.raises(PlanError, match="b: there are no stages to share with a"):
        replace(other, factorization=Tucker(), rank=(12, 8))


def test_decision_has_latencies_in_its_costs() -> None:
    timed = Decision(path="a", spec=SPEC, factorization=ChannelSVD(), rank=(4,), latencies_ms=(3.0, 1.5))
    assert (timed.before.ms, timed.after.ms) == (3.0, 1.5)


def test_rewrite_identifies_path_factorization_options_and_rank() -> None:
    one = Decision(path="a", spec=SPEC, factorization=Tucker(), rank=(4, 3))
    others = [
        Decision(path="b", spec=SPEC, factorization=Tucker(), rank=(4, 3)),
        Decision(path="a", spec=SPEC, factorization=Tucker(sweeps=1), rank=(4, 3)),
        Decision(path="a", spec=SPEC, factorization=Tucker(), rank=(3, 3)),
    ]
    assert len({one.rewrite, *(other.rewrite for other in others)}) == 4
    same = Decision(path="a", spec=SPEC, factorization=Tucker(), rank=(4, 3), note="a note")
    assert same.rewrite == one.rewrite


@pytest.mark.parametrize(
    "decision",
    [
        Decision(path="a", spec=None, reason="it could not be parsed"),
        Decision(path="a", spec=SPEC, reason="dense"),
        Decision(
            path="a",
            spec=SPEC,
            input_sizes=((5, 5), (7, 5)),
            tied_to="b",
            factorization=Tucker(sweeps=3),
            rank=(4, 3),
            note="a note",
            predicted_loss_increase=0.5,
            latencies_ms=(3.0, 1.5),
        ),
    ],
    ids=["unparsed", "dense", "rewritten"],
)
def test_decision_survives_json(decision: Decision) -> None:
    assert decision_from_json(json.loads(json.dumps(decision_to_json(decision))), KNOWN) == decision


def test_decision_with_an_unknown_factorization_says_how_to_load_it() -> None:
    data = decision_to_json(Decision(path="a", spec=SPEC, factorization=Tucker(), rank=(4, 3)))
    with pytest.raises(PlanError, match=r"unknown factorization 'tucker'. Pass its class as factorizations="):
        decision_from_json(data, {})


def test_reasons_are_counted_without_their_details() -> None:
    reasons = ["excluded", "too small: 3", "excluded", "too small: 4", "excluded", "other", "another"]
    decisions = [Decision(path=str(k), spec=None, reason=reason) for k, reason in enumerate(reasons)]
    assert summarize_reasons(decisions, most=2) == "3× excluded; 2× too small: 3; and 2 other reasons"
    assert summarize_reasons(decisions[:1]) == "1× excluded"
