"""Tables that fit a width."""

from __future__ import annotations

import os

import pytest

from fxfact.errors import ArgumentError
from fxfact.utils import Column, Table, terminal_width, wrap_lines

COLUMNS = (
    Column("path", 0, least=8),
    Column("layer", 3),
    Column(("parameters", "params"), 1),
    Column("remark", 2, least=10, wrap=True),
)
ROWS = (
    ("layer1.0.conv1", ("Conv2d(3→16, 3×3)", "3→16"), ("1,000,000 → 500,000", "1M → 500k", "500k"), "the first one"),
    (
        "layer1.0.conv2",
        ("Conv2d(16→16, 3×3)", "16→16"),
        ("2,000 → 500", "2k → 500", "500"),
        "shares its weight with it",
    ),
)
TABLE = Table(COLUMNS, ROWS)


def test_table_without_a_width_has_everything() -> None:
    header, rule, *rows = TABLE.format().splitlines()
    assert header.split() == ["path", "layer", "parameters", "remark"]
    assert set(rule) == {"-", " "}
    assert all(
        cell if isinstance(cell, str) else cell[0] in row
        for row, cells in zip(rows, ROWS, strict=True)
        for cell in cells
    )
    assert TABLE.left_out(None) == []


@pytest.mark.parametrize("width", range(20, 100))
def test_table_fits_every_width_and_says_what_it_left_out(width: int) -> None:
    text = TABLE.format(width)
    assert max(map(len, text.splitlines())) <= width
    shown = text.splitlines()[0].split()
    assert shown[0] == "path"
    hidden = TABLE.left_out(width)
    assert len(shown) + len(hidden) == 4
    assert ("left out of" in text) == bool(hidden)


def test_wider_tables_show_no_fewer_columns() -> None:
    counts = [len(TABLE.left_out(width)) for width in range(20, 100)]
    assert counts == sorted(counts, reverse=True)
    assert {counts[0], counts[-1]} == {2, 0}


def test_columns_are_shortened_before_they_are_left_out() -> None:
    full, short = TABLE.format(90), TABLE.format(60)
    assert "1,000,000 → 500,000" in full
    assert "Conv2d(3→16, 3×3)" in full
    assert "parameters" not in short
    assert TABLE.left_out(60) == []


def test_paths_keep_their_end_and_remarks_go_on_in_further_lines() -> None:
    table = Table(
        [Column("path", 0, least=8), Column("remark", 1, least=10, wrap=True)], [("layer1.0.conv2", "one two three")]
    )
    lines = table.format(20).splitlines()
    assert lines[2].split() == ["…0.conv2", "one", "two"]
    assert lines[3].split() == ["three"]


def test_cells_of_several_lines_stay_in_their_column() -> None:
    lines = Table([Column("path", 0), Column("stages", 1)], [("a", "first\nsecond"), ("b", "")]).format().splitlines()
    assert [line.find("first") for line in lines if "first" in line] == [
        line.find("second") for line in lines if "second" in line
    ]
    assert lines[-1] == "b"


def test_total_is_divided_from_the_rows() -> None:
    lines = Table([Column("path", 0)], [("a",), ("all",)], has_total=True).format().splitlines()
    assert [set(line) == {"-"} for line in lines] == [False, True, False, True, False]


def test_empty_columns_are_not_shown() -> None:
    table = Table([Column("path", 0), Column("remark", 1), Column("rank", 2)], [("a", "", ("", "")), ("b", "", "3")])
    assert table.format().splitlines()[0].split() == ["path", "rank"]
    assert table.format(20).splitlines()[0].split() == ["path", "rank"]
    assert table.left_out(20) == []


def test_table_without_rows_has_a_header() -> None:
    assert Table([Column("path", 0), Column("rank", 1)], []).format(30).splitlines()[0] == "path  rank"


@pytest.mark.parametrize("width", [0, -3, 19, 80.0, "80", True])
def test_widths_that_are_none_are_refused(width: object) -> None:
    with pytest.raises(ArgumentError, match="width must be an int, at least 20"):
        TABLE.format(width)  # type: ignore[arg-type]


def test_lines_are_broken_at_the_width() -> None:
    text = "captured as one graph\n  not by its modules: 123456789012345678901234567890"
    assert wrap_lines(text, None) == text
    broken = wrap_lines(text, 20).splitlines()
    assert max(map(len, broken)) <= 20
    assert "".join("".join(broken).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("columns", "terminal", "expected"),
    [
        ("100", 80, 100),
        ("7", 80, 20),
        ("0", 80, 80),
        (None, 200, 200),
        (None, 0, 120),
        (None, None, 120),
        ("wide", 80, 80),
    ],
)
def test_width_is_that_of_the_terminal_or_of_columns(
    columns: str | None, terminal: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def size(_: int) -> os.terminal_size:
        if terminal is None:
            raise OSError("not a terminal")
        return os.terminal_size((terminal, 0))

    monkeypatch.setattr(os, "get_terminal_size", size)
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert terminal_width() == expected
