"""A report says what is so, in text, JSON, pictures and Graphviz source."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfact
from fxfact.analysis import Report
from fxfact.analysis.report_data import Block, BlockDiagram
from fxfact.conv import ConvSpec
from fxfact.errors import ArgumentError, ArgumentTypeError, FileError, PlanError
from fxfact.factorizations import Factorization, Tucker
from fxfact.utils import peak_bytes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.body = nn.Conv2d(12, 12, 3, padding=1, groups=2)
        self.thin = nn.Conv2d(12, 1, 1)
        self.up = nn.ConvTranspose2d(12, 10, 4, stride=2, bias=False)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.body(x) * self.thin(x))
        return self.head(self.up(x).mean((2, 3)))


class Own(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > -1e9 else -x)


HOW: dict[str, Any] = {"stem": "channel_svd", "body": "tucker", "up": "cp", "*": "pointwise_svd"}


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def made(kind: type[Net], x: Tensor, *, exported: bool = False) -> tuple[Any, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = kind().eval()
    model = torch.export.export(model, (x,)) if exported else model
    return model, fxfact.factorize(model, HOW, rank=0.5, allow_growth=True, example_inputs=None if exported else x)


@pytest.fixture(scope="module")
def found(x: Tensor) -> Report:
    return fxfact.report(*made(Net, x), x)


def test_its_numbers_are_those_of_the_plan_and_of_verify(found: Report, x: Tensor) -> None:
    model, small = made(Net, x)
    plan, verified = fxfact.plan_of(small), fxfact.verify(model, small, x)
    assert (found.before, found.after) == (plan.network, plan.after)
    assert (found.graph_error, found.end_to_end_error) == pytest.approx((verified.graph, verified.end_to_end))
    assert found.ok
    by_path = {conv.path: conv for conv in found.convolutions}
    assert list(by_path) == [decision.path for decision in plan]
    for site in verified.sites:
        assert (by_path[site.path].kernel_error, by_path[site.path].output_error) == (site.weight, site.output)
    assert "single channel" in by_path["thin"].reason
    assert by_path["thin"].milliseconds is None
    assert all(min(by_path[path].milliseconds or (0,)) > 0 for path in ("stem", "body", "up"))
    assert min(found.milliseconds) > 0


def test_the_peak_of_activations_is_what_lives_at_one_time(found: Report) -> None:
    x = torch.randn(2, 100)  # 800 bytes, as every tensor here
    kept: list[Tensor] = []

    def chained() -> Tensor:
        return (x + 1).relu_().view(-1).neg().neg()

    assert peak_bytes(chained) == 1600
    assert peak_bytes(lambda: kept.extend([x + 1, x + 2, x + 3])) == 2400
    assert peak_bytes(lambda: x.view(-1).add_(1)) == 0  # in place
    by_path = {conv.path: conv for conv in found.convolutions}
    (rank,) = by_path["stem"].rank
    assert by_path["stem"].activation_bytes == (4 * 2 * 12 * 64, 4 * 2 * (12 + rank) * 64)
    assert by_path["thin"].activation_bytes is None
    before, after = found.activation_bytes
    assert 4 * 2 * 3 * 12 * 64 < before <= after
    assert f"{before / 1e6:.3g} → {after / 1e6:.3g}" in found.to_html() or before == after


def test_spectra_are_of_the_unfoldings_whose_ranks_are_chosen(found: Report, x: Tensor) -> None:
    model, small = made(Net, x)
    by_path = {conv.path: conv for conv in found.convolutions}
    (spectrum,) = by_path["stem"].spectra
    wanted = torch.linalg.svdvals(model.stem.weight.detach().double().flatten(1))
    torch.testing.assert_close(torch.tensor(spectrum.values).double(), wanted / wanted[0])
    assert (spectrum.rank,) == fxfact.plan_of(small)["stem"].rank
    assert [(s.name, s.rank) for s in by_path["body"].spectra] == [
        (f"6×{6 * 9}", rank) for rank in fxfact.plan_of(small)["body"].rank or ()
    ]
    halves = [torch.linalg.svdvals(half.flatten(1)) for half in model.body.weight.detach().double().chunk(2)]
    wanted = torch.stack(halves).square().mean(0).sqrt()
    torch.testing.assert_close(torch.tensor(by_path["body"].spectra[0].values).double(), wanted / wanted[0])
    assert [s.name for s in by_path["up"].spectra] == [f"10×{12 * 16}", f"12×{10 * 16}"]  # CP: along both channels


def test_the_pictures_show_the_graph(found: Report, x: Tensor) -> None:
    before, after = found.flows
    assert (before.macs, after.macs) == (found.before.macs, found.after.macs)
    labels = [block.label for block in before.blocks]
    assert labels == ["x", "stem", "body", "thin", "mul", "add", "up", "head", "output"]
    assert before.blocks[1].behind == ("BatchNorm2d", "relu")
    assert [before.blocks[i].label for i in before.blocks[5].inputs] == ["stem", "mul"]
    chains = {block.label: len(block.stages) for block in after.blocks if block.kind == "chain"}
    assert chains == {path: len(fxfact.plan_of(made(Net, x)[1])[path].stages) for path in ("stem", "body", "up")}
    assert [block.inputs for block in after.blocks] == [block.inputs for block in before.blocks]


@pytest.mark.parametrize("kind", ["modules", "export"])
def test_other_ways_of_capturing_are_reported_alike(kind: str, found: Report, x: Tensor) -> None:
    model, small = made(Own if kind == "modules" else Net, x, exported=kind == "export")
    report = fxfact.report(model, small, None if kind == "export" else x)
    assert report.capture == kind
    assert report.ok
    assert all(flow.wired == (kind == "export") for flow in report.flows)
    for one, other in zip(found.convolutions, report.convolutions, strict=True):
        assert (one.path, one.rank, one.before, one.after) == (other.path, other.rank, other.before, other.after)
        assert (one.kernel_error or 0) == pytest.approx(other.kernel_error or 0, rel=1e-3)
        assert (one.milliseconds is None) == (other.milliseconds is None)
    chains = [{b.label: b.stages for b in each.flows[1].blocks if b.kind == "chain"} for each in (found, report)]
    assert chains[0] == chains[1]
    assert json.loads(json.dumps(report.to_json()))["capture"] == kind
    assert "keeps its own Python" in report.to_html() or kind == "export"


def test_shares_are_of_all_that_the_model_computes_whether_or_not_it_has_a_block(x: Tensor) -> None:
    shares = []
    for kind in (Net, Own):
        model, small = made(kind, x)
        page = fxfact.report(model, small, x).to_html()
        shares.append(re.findall(r"stem [^<]*MACs, ([\d.]+%)", page))
    assert shares[0][0] == shares[1][0] != "100.0%"


def test_a_chain_that_is_called_twice_is_drawn_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(torch.relu(self.conv(x))))

    small = fxfact.factorize(Twice().eval(), "tucker", rank=0.5)
    assert fxfact.to_dot(small).count("subgraph") == 3


@dataclass(frozen=True, kw_only=True)
class _Bottleneck(Factorization):
    """Tucker, of which is not told that its ranks are those of matrices."""

    name = "bottleneck"

    def _rejects(self, block: ConvSpec) -> str | None:
        return Tucker()._rejects(block)

    def _max_rank(self, block: ConvSpec) -> tuple[int, ...]:
        return Tucker()._max_rank(block)

    def _stages(self, block: ConvSpec, rank: tuple[int, ...]) -> tuple[ConvSpec, ...]:
        return Tucker()._stages(block, rank)

    def _weights(self, block: ConvSpec, weight: Tensor, rank: tuple[int, ...], random: Any) -> Sequence[Tensor]:
        return Tucker()._weights(block, weight, rank, random)


def test_a_report_has_no_spectra_where_ranks_are_of_no_matrix_that_is_known(x: Tensor) -> None:
    model = Net().eval()
    report = fxfact.report(model, fxfact.factorize(model, _Bottleneck(), rank=0.5, example_inputs=x), x)
    assert [conv.spectra for conv in report.convolutions if conv.rank] == [()] * 3
    assert "<svg" in report.to_html()


class _Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        assert not {name for name, _ in attrs} & {"src", "srcset", "onclick"}
        assert all(value == "data:," for name, value in attrs if name == "href")
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_is_well_formed(found: Report) -> None:
    hostile = "</svg><script>alert('x')</script>&"
    conv = replace(found.convolutions[0], path=hostile, reason=hostile)
    named = replace(found.convolutions[0], factorization=hostile, note=f"lowered {hostile}", reason="")
    flow = BlockDiagram(
        blocks=(*found.flows[1].blocks, Block(kind="chain", label=hostile, stages=(hostile,))), wired=True
    )
    page = replace(
        found, model=hostile, convolutions=(conv, named, *found.convolutions), flows=(found.flows[0], flow)
    ).to_html()
    parser = _Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.seen.count("script") == 1
    assert not re.search(r"https?:|url\(|@import", page)
    assert page.count(hostile) == 0
    assert "lowered &lt;/svg&gt;" in page
    pictures = re.findall(r'<svg viewBox.*?</svg>(?=</div>)|<svg class="curve".*?</svg>', found.to_html(), re.DOTALL)
    assert len(pictures) == 2 + sum(len(conv.spectra) for conv in found.convolutions)
    assert all(ET.fromstring(picture).tag == "svg" for picture in pictures)


def test_a_browser_shows_the_page_and_its_stages(found: Report, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser is here: install chromium")
    chains = sum(bool(block.stages) for block in found.flows[1].blocks)
    click = "<script>document.getElementById('all').click(); console.log('clicked')</script>"
    page = tmp_path / "report.html"
    page.write_text(found.to_html().replace("</body>", f"{click}</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/profile"]
    done = subprocess.run(
        [browser, *flags, "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    said = re.findall(r'CONSOLE.*?\] "(.*?)"', done.stderr)
    assert said == ["clicked"]
    assert done.stdout.count('class="chain open"') == chains == 3


def test_graphviz_source_names_every_block_and_wire(found: Report, x: Tensor, tmp_path: Path) -> None:
    _, small = made(Net, x)
    source = fxfact.to_dot(small, example_inputs=x)
    defined = set(re.findall(r"(block_\d+_\d+) \[", source))
    wires = re.findall(r"(block_\d+_\d+) -> (block_\d+_\d+)", source)
    assert {name for wire in wires for name in wire} <= defined
    assert source.count("subgraph") == 3
    assert len(wires) >= sum(len(block.inputs) for block in found.flows[1].blocks)
    if shutil.which("dot"):
        drawn = subprocess.run(["dot", "-Tsvg"], input=source, capture_output=True, text=True, check=True).stdout
        assert "thin" in drawn


def test_it_is_written_and_printed(found: Report, tmp_path: Path) -> None:
    found.save(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == found.to_html()
    found.save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [conv["path"] for conv in data["convolutions"]] == [conv.path for conv in found.convolutions]
    text = str(found)
    assert all(conv.path in text for conv in found.convolutions)
    assert "graph" in text


def test_what_cannot_be_is_refused(found: Report, x: Tensor, tmp_path: Path) -> None:
    model, small = made(Net, x)
    with pytest.raises(PlanError, match="not made by a plan"):
        fxfact.report(model, model, x)
    with pytest.raises(ArgumentError, match="pass example_inputs"):
        fxfact.report(model, small)
    with pytest.raises(ArgumentError, match=r"NAME\.html"):
        found.save(tmp_path / "report.pdf")
    with pytest.raises(FileError, match="cannot be written"):
        found.save(tmp_path / "nowhere" / "report.html")


def test_a_pass_is_seen_by_torchs_logs_and_structured_trace(tmp_path: Path) -> None:
    script = (
        "import torch, fxfact\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3), torch.nn.ReLU())\n"
        "fxfact.factorize(net, 'tucker', rank=0.5)\n"
    )
    environment = {**os.environ, "TORCH_LOGS": "+fxfact", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert "FactorizeConvs carried out" in done.stderr
    assert "1 of 1 rewritten" in done.stderr
    (log,) = tmp_path.glob("*.log")
    text = log.read_text(encoding="utf-8")
    assert '"artifact": {"name": "fxfact_FactorizeConvs"' in text
    assert "class GraphModule" in text


def test_data_of_a_report_are_json_whatever_the_errors_are(x: Tensor, tmp_path: Path) -> None:
    model, small = made(Net, x)
    found = replace(fxfact.report(model, small, x), end_to_end_error=math.inf, graph_error=math.nan)
    found.save(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert read["end_to_end_error"] is read["graph_error"] is None
    with pytest.raises(ArgumentTypeError, match="path must be"):
        found.save(3)  # type: ignore[arg-type]
