from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfact
from fxfact.analysis import Report
from fxfact.conv import ConvSpec
from fxfact.errors import ArgumentError, ArgumentTypeError, FileError, PlanError
from fxfact.factorizations import Factorization, Tucker


def test_report_has_the_numbers_of_plan_and_verify(report: Report, networks: tuple[Any, Any], x: Tensor) -> None:
    model, small = networks
    plan, verified = fxfact.plan_of(small), fxfact.verify(model, small, x)
    assert (report.before, report.after) == (plan.network, plan.after)
    assert (report.graph_error, report.end_to_end_error) == pytest.approx((verified.graph, verified.end_to_end))
    assert (report.ok, report.tolerance, report.changed) == (True, verified.tolerance, ())
    by_path = {conv.path: conv for conv in report.convolutions}
    assert list(by_path) == [decision.path for decision in plan]
    for site in verified.sites:
        assert (by_path[site.path].kernel_error, by_path[site.path].output_error) == (site.weight, site.output)
    assert "single channel" in by_path["thin"].reason
    assert by_path["thin"].milliseconds is None
    assert all(min(by_path[path].milliseconds or (0,)) > 0 for path in ("stem", "body", "up"))
    assert min(report.milliseconds) > 0


def test_report_has_the_peak_memory_of_activations(report: Report) -> None:
    by_path = {conv.path: conv for conv in report.convolutions}
    (rank,) = by_path["stem"].rank
    assert by_path["stem"].activation_bytes == (4 * 2 * 12 * 64, 4 * 2 * (12 + rank) * 64)
    assert by_path["thin"].activation_bytes is None
    before, after = report.activation_bytes
    assert 4 * 2 * 3 * 12 * 64 < before <= after
    assert f"{before / 1e6:.3g} → {after / 1e6:.3g}" in report.to_html() or before == after


def test_report_has_spectra_of_the_unfoldings_whose_ranks_are_chosen(report: Report, networks: tuple[Any, Any]) -> None:
    model, small = networks
    by_path = {conv.path: conv for conv in report.convolutions}
    (spectrum,) = by_path["stem"].spectra
    expected = torch.linalg.svdvals(model.stem.weight.detach().double().flatten(1))
    torch.testing.assert_close(torch.tensor(spectrum.values).double(), expected / expected[0])
    assert (spectrum.rank,) == fxfact.plan_of(small)["stem"].rank
    assert [(s.name, s.rank) for s in by_path["body"].spectra] == [
        (f"6×{6 * 9}", rank) for rank in fxfact.plan_of(small)["body"].rank or ()
    ]
    halves = [torch.linalg.svdvals(half.flatten(1)) for half in model.body.weight.detach().double().chunk(2)]
    expected = torch.stack(halves).square().mean(0).sqrt()
    torch.testing.assert_close(torch.tensor(by_path["body"].spectra[0].values).double(), expected / expected[0])
    assert [s.name for s in by_path["up"].spectra] == [f"10×{12 * 16}", f"12×{10 * 16}"]  # CP: along both channels


@dataclass(frozen=True, kw_only=True)
class _Bottleneck(Factorization):
    """Tucker, without saying that its ranks are those of matrices."""

    name = "bottleneck"

    def _rejects(self, block: ConvSpec) -> str | None:
        return Tucker()._rejects(block)

    def _max_rank(self, block: ConvSpec) -> tuple[int, ...]:
        return Tucker()._max_rank(block)

    def _stages(self, block: ConvSpec, rank: tuple[int, ...]) -> tuple[ConvSpec, ...]:
        return Tucker()._stages(block, rank)

    def _weights(self, block: ConvSpec, weight: Tensor, rank: tuple[int, ...], random: Any) -> Sequence[Tensor]:
        return Tucker()._weights(block, weight, rank, random)


def test_report_has_no_spectra_for_ranks_of_no_known_matrix(
    make_networks: Callable[..., tuple[Any, Any]], x: Tensor
) -> None:
    report = fxfact.report(*make_networks(factorization=_Bottleneck()), x)
    assert [conv.spectra for conv in report.convolutions if conv.rank] == [()] * 3
    assert "<svg" in report.to_html()


@pytest.mark.parametrize("capture", ["modules", "export"])
def test_report_is_the_same_for_every_capture(
    capture: str, report: Report, make_networks: Callable[..., tuple[Any, Any]], x: Tensor
) -> None:
    other = fxfact.report(*make_networks(capture), None if capture == "export" else x)
    assert other.capture == capture
    assert other.ok
    assert all(diagram.has_edges == (capture == "export") for diagram in other.diagrams)
    for ours, theirs in zip(report.convolutions, other.convolutions, strict=True):
        assert (ours.path, ours.rank, ours.before, ours.after) == (
            theirs.path,
            theirs.rank,
            theirs.before,
            theirs.after,
        )
        assert (ours.kernel_error or 0) == pytest.approx(theirs.kernel_error or 0, rel=1e-3)
        assert (ours.milliseconds is None) == (theirs.milliseconds is None)
    chains = [{b.label: b.stages for b in each.diagrams[1].blocks if b.kind == "chain"} for each in (report, other)]
    assert chains[0] == chains[1]
    assert json.loads(json.dumps(other.to_json()))["capture"] == capture
    page = other.to_html()
    assert "keeps the model's own Python" in page or capture == "export"
    shares = [re.findall(r"stem [^<]*MACs, ([\d.]+%)", html)[0] for html in (report.to_html(), page)]
    assert shares[0] == shares[1] != "100.0%", "shares are of the whole model, also if it has no graph"


def test_report_says_what_was_verified(report: Report) -> None:
    check = "on these inputs, the network equals the original with the same kernels"
    assert f"graph check passed: {check}" in str(report)
    assert str(report).startswith(f"approximation error {100 * report.end_to_end_error:.1f} %: relative error of the")
    assert "changed" not in str(report)
    wrong = replace(report, graph_error=0.5, ok=False).table()
    assert "graph check FAILED: on these inputs, the network differs" in wrong
    assert "(relative error 5.00e-01, tolerance 1e-04)" in wrong
    assert "FAILED" in str(replace(report, graph_error=math.nan, ok=False))


def test_report_names_the_tensors_that_were_not_verified(networks: tuple[Any, Any], x: Tensor) -> None:
    model, small = networks
    trained = copy.deepcopy(small)
    with torch.no_grad():
        trained.norm.bias.add_(0.1)
    report = fxfact.report(model, trained, x)
    assert report.ok
    assert report.changed == ("norm.bias",)
    for text in (str(report), report.to_html()):
        assert "taken from the factorized network: norm.bias" in text
    assert report.to_json()["changed"] == ("norm.bias",)


def test_report_is_printed_and_saved(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.to_html()
    report.save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [conv["path"] for conv in data["convolutions"]] == [conv.path for conv in report.convolutions]
    assert data["ok"] is True
    text = str(report)
    assert all(conv.path in text for conv in report.convolutions)
    assert "graph" in text


def test_report_is_json_for_all_errors(report: Report, tmp_path: Path) -> None:
    replace(report, end_to_end_error=math.inf, graph_error=math.nan).save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert data["end_to_end_error"] is data["graph_error"] is None


def test_report_refuses_what_it_cannot_do(report: Report, networks: tuple[Any, Any], x: Tensor, tmp_path: Path) -> None:
    model, small = networks
    with pytest.raises(PlanError, match="not made by a plan"):
        fxfact.report(model, model, x)
    with pytest.raises(ArgumentError, match="pass example_inputs"):
        fxfact.report(model, small)
    with pytest.raises(ArgumentError, match=r"NAME\.html"):
        report.save(tmp_path / "report.pdf")
    with pytest.raises(FileError, match="cannot be written"):
        report.save(tmp_path / "nowhere" / "report.html")
    with pytest.raises(ArgumentTypeError, match="path must be"):
        report.save(3)  # type: ignore[arg-type]
