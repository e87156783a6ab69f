"""Tables for a terminal of 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH, GAP = 100, 2
LEAST = 12  # minimum width of a row's name, in columns


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column is aligned to the left, the others to the right.

    A column is as wide as its values; longer names of columns and rows are wrapped.
    """
    values = zip(*(row[1:] for row in rows), strict=True)
    widths = [
        max(*map(len, column), *map(len, name.split()), 1) for name, column in zip(header[1:], values, strict=True)
    ]
    room = max(LEAST, WIDTH - sum(widths) - GAP * len(widths))
    left = min(room, max(len(row[0]) for row in (header, *rows)))
    return "\n".join(line for row in (header, *rows) for line in _lines(row, [left, *widths], low=row is header))


def _lines(row: Sequence[str], widths: Sequence[int], low: bool) -> list[str]:
    """The lines of one row; low: cells with fewer lines are aligned to the bottom."""
    cells = [textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(row, widths, strict=True)]
    height = max(1, *map(len, cells))
    filled = [[""] * (height - len(cell)) + cell if low else cell + [""] * (height - len(cell)) for cell in cells]
    gap = " " * GAP
    return [
        gap.join([first.ljust(widths[0]), *(each.rjust(width) for each, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in zip(*filled, strict=True)
    ]
