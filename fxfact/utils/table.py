"""Tables that fit a width. If space is short, cells are shortened, and then the least important columns left out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from textwrap import fill

from fxfact.errors import check_int

Cell = str | tuple[str, ...]
"""The text of a cell, or several texts for it, from the longest to the shortest."""

_SPACE = "  "  # between two columns
_LEAST_WIDTH = 20  # of a table
_WIDTH_IN_FILES = 120  # where the output is no terminal


def terminal_width() -> int:
    """Return the width of the terminal, that in ``COLUMNS`` if it is set, or 120 if the output is no terminal."""
    return max(_LEAST_WIDTH, shutil.get_terminal_size((_WIDTH_IN_FILES, 0)).columns)


def wrap_lines(text: str, width: int | None) -> str:
    """Break every line that is longer than ``width``. None breaks no line."""
    if width is None:
        return text
    return "\n".join(fill(line, width, subsequent_indent="  ", break_on_hyphens=False) for line in text.splitlines())


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        header: Its name.
        importance: Its place among the columns if some have to be left out: 0 is left out last.
        least: The width to which its texts may be cut, or None if they are never cut.
        wrap: Whether a text that is too long goes on in further lines. Otherwise its beginning is cut off.
    """

    header: Cell
    importance: int
    least: int | None = None
    wrap: bool = False

    def text(self, cell: Cell, level: int, width: int) -> str:
        """Return the text of a cell at a level of shortening, within a width."""
        text = _form(cell, level)
        if self.wrap:
            return "\n".join(fill(line, width, break_on_hyphens=False) for line in text.splitlines())
        return text if _text_width(text) <= width else f"…{text[1 - width :]}"


@dataclass(frozen=True)
class Table:
    """A table of texts. Columns that are empty are not shown.

    Attributes:
        columns: The columns, from left to right.
        rows: The cells of every row.
        has_total: Whether the last row is about all others, so that a line divides it from them.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    has_total: bool = False

    def format(self, width: int | None = None) -> str:
        """Return the table as text.

        Args:
            width: Number of characters in a line. None shows every column with its longest texts.

        Returns:
            The lines of the table. A last line names the columns that were left out, if any.

        Raises:
            ArgumentError: ``width`` is less than 20.
        """
        shown = self._fit(width)
        widths = [room for _, room in shown.values()]
        texts = [self._row_text(row, shown) for row in ([column.header for column in self.columns], *self.rows)]
        rule = _join(["-" * room for room in widths], widths)
        texts.insert(1, rule)
        if self.has_total:
            texts.insert(-1, rule)
        if hidden := ", ".join(self.left_out(width)):
            texts.append(wrap_lines(f"left out of {width} characters: {hidden}", width))
        return "\n".join(texts)

    def left_out(self, width: int | None) -> list[str]:
        """Return the names of the columns that are left out of a table of this width."""
        shown = self._fit(width)
        return [_form(self.columns[k].header, 0) for k in self._filled() if k not in shown]

    def _filled(self) -> list[int]:
        """Return the numbers of the columns with a text in any row. Without rows, these are all columns."""
        return [k for k in range(len(self.columns)) if not self.rows or any(_form(row[k], 0) for row in self.rows)]

    def _row_text(self, cells: Sequence[Cell], shown: Mapping[int, tuple[int, int]]) -> str:
        """Return a row, in as many lines as its longest cell has."""
        parts = [self.columns[k].text(cells[k], *shown[k]).splitlines() for k in shown]
        widths = [room for _, room in shown.values()]
        return "\n".join(_join(line, widths) for line in zip_longest(*parts, fillvalue=""))

    def _fit(self, width: int | None) -> dict[int, tuple[int, int]]:
        """Return the level of shortening and the width of every column that is shown."""
        numbers = self._filled()
        if width is None:
            return {k: (0, self._column_width(k, 0)) for k in numbers}
        cells = chain((column.header for column in self.columns), *self.rows)
        shortest = max((len(cell) for cell in cells if isinstance(cell, tuple)), default=1)
        by_importance = sorted(numbers, key=lambda k: self.columns[k].importance)
        free = check_int("width", width, _LEAST_WIDTH) + len(_SPACE)
        fitted: dict[int, tuple[int, int]] = {}
        for k in by_importance:  # as many columns as fit with their shortest texts
            needed = self._least_width(k, shortest) + len(_SPACE)
            if needed <= free or not fitted:
                fitted[k] = (shortest, needed - len(_SPACE))
                free -= needed
        for level in reversed(range(shortest)):  # longer texts, as far as the width allows
            for k in [k for k in by_importance if k in fitted]:
                more = self._column_width(k, level) - fitted[k][1]
                if more <= free:
                    fitted[k] = (level, fitted[k][1] + more)
                    free -= more
        for k, (level, given) in fitted.items():  # the rest to texts that are still cut
            more = max(0, min(free, self._column_width(k, level) - given))
            fitted[k] = (level, given + more)
            free -= more
        return dict(sorted(fitted.items()))

    def _least_width(self, number: int, level: int) -> int:
        column, width = self.columns[number], self._column_width(number, level)
        return (
            width if column.least is None else min(width, max(column.least, _text_width(_form(column.header, level))))
        )

    def _column_width(self, number: int, level: int) -> int:
        cells = [self.columns[number].header, *(row[number] for row in self.rows)]
        return max(_text_width(_form(cell, level)) for cell in cells)


def _join(parts: Sequence[str], widths: Sequence[int]) -> str:
    return _SPACE.join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip()


def _form(cell: Cell, level: int) -> str:
    return cell if isinstance(cell, str) else cell[min(level, len(cell) - 1)]


def _text_width(text: str) -> int:
    return max(map(len, text.splitlines()), default=0)
