from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import fxfact
from fxfact.errors import ArgumentError, FileError
from tests.support import Small


def test_diff_shows_only_what_changed(small: Small) -> None:
    result = fxfact.factorize(small, "tt", include="second")
    lines = fxfact.diff(small, result, context=1).table().splitlines()
    assert sum("│ +" in line for line in lines) == 4
    assert sum(line.startswith("-") for line in lines) == 1
    assert any(line.startswith("- second = second(relu): Conv2d(8→12") for line in lines)
    assert any("│ + second = second.3(second_2): Conv2d(" in line for line in lines)
    assert not any(line.startswith(("  norm =", "  first =", "  mean =")) for line in lines)
    assert any("relu_1 = relu(second)" in line for line in lines)


def test_equal_networks_have_no_diff(small: Small) -> None:
    nothing = fxfact.diff(small, small)
    assert not nothing
    assert str(nothing) == nothing.table(20) == ""


def test_diff_separates_distant_changes() -> None:
    model = nn.Sequential(*(nn.Conv1d(4, 4, 3, padding=1) for _ in range(8)))
    result = fxfact.factorize(model, include=["0", "7"])
    assert len(fxfact.diff(model, result, context=1).groups) == 2
    assert str(fxfact.diff(model, result, context=1)).count("⋯") == 1
    assert str(fxfact.diff(model, result, context=9)).count("⋯") == 0


@pytest.mark.parametrize("width", [20, 21, 80, 120])
def test_diff_fits_the_width(small: Small, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fxfact.diff(small, fxfact.factorize(small))
    monkeypatch.setenv("COLUMNS", str(width))
    assert str(found) == found.table(width)
    assert max(map(len, found.table(width).splitlines())) <= width
    assert max(map(len, found.table().splitlines())) > 120


def test_diff_is_saved_as_text_or_data(small: Small, tmp_path: Path) -> None:
    found = fxfact.diff(small, fxfact.factorize(small, include="second"), context=0)
    found.save(tmp_path / "diff.txt")
    assert (tmp_path / "diff.txt").read_text(encoding="utf-8") == f"{found.table()}\n"
    found.save(tmp_path / "diff.json")
    data = json.loads((tmp_path / "diff.json").read_text())
    assert data["groups"][0][0]["before"].startswith("second = second(relu): Conv2d(")
    assert [line["changed"] for group in data["groups"] for line in group] == [True] * 3
    with pytest.raises(ArgumentError, match=r"a diff is written to NAME\.txt or NAME\.json, got .*diff\.html"):
        found.save(tmp_path / "diff.html")
    with pytest.raises(FileError, match="cannot be written there"):
        found.save(tmp_path / "absent" / "diff.txt")
