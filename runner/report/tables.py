"""Tables that fit the terminal. Where there is no room for all columns, the least important are left out; numbers are
never cut."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from runner.runs.short_names import shortened

# Widths in characters.
GAP = 2  # between two columns
NARROW = 80  # a terminal with fewer columns is narrow
MIN_NAME, MIN_NAME_NARROW = 28, 16  # kept for a run's name before columns are left out; on a narrow terminal
MAX_TITLE = 12  # a title up to this width is never broken into lines
PIPE_WIDTH = 200


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let fluxrun choose the exit code. rich would exit with 1, which here means that a run failed."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def console() -> Console:
    """A console on stdout, as wide as the terminal or COLUMNS; a pipe gets PIPE_WIDTH."""
    unbounded = not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdecimal()
    return _Console(highlight=False, width=PIPE_WIDTH if unbounded else None)


def print_parts(screen: Console, parts: Iterable[RenderableType]) -> None:
    """Print tables folded to the console's width, and lines of text unfolded."""
    for part in parts:
        screen.print(part, soft_wrap=isinstance(part, Text))


@dataclass(frozen=True)
class Column:
    """cells: one per row. width: of the widest cell. drop_order: columns with the highest number are left out first
    where room is short, those with 0 never."""

    title: str
    cells: Sequence[RenderableType]
    width: int
    drop_order: int
    right: bool = False


def column(
    title: str, cells: Sequence[str | Text], drop_order: int, *, right: bool = False, limit: int | None = None
) -> Column:
    """A column of text. Cells longer than `limit` are cut in the middle; different texts stay different."""
    if limit is not None:
        cells = shortened([str(cell) for cell in cells], limit)
    texts = [cell if isinstance(cell, Text) else Text(cell) for cell in cells]  # Text: no markup in users' words
    return Column(title, texts, max((text.cell_len for text in texts), default=0), drop_order, right)


def fitted(names: Sequence[str], columns: Iterable[Column], width: int) -> Iterator[RenderableType]:
    """One table of `names` and as many of the columns as fit `width`, and a line that names the others. Titles are
    broken into lines only if that makes room. Columns without any text are left out silently."""
    columns = [column for column in columns if column.width]
    for break_titles in (False, True):
        widths = [_column_width(column, break_titles) for column in columns]
        room = width - 1 - _min_name_width(names, width)
        shown = []
        for index in sorted(range(len(columns)), key=lambda index: columns[index].drop_order):
            if columns[index].drop_order == 0 or widths[index] + GAP <= room:
                shown.append(index)
                room -= widths[index] + GAP
        if len(shown) == len(columns):
            break
    yield _table(names, [columns[index] for index in sorted(shown)], width, break_titles)
    if missing := [column.title for index, column in enumerate(columns) if index not in shown and column.title]:
        yield Text(f"not shown for lack of room: {', '.join(missing)}", style="dim")


def wrapped(names: Sequence[str], columns: Iterable[Column], width: int) -> Iterator[RenderableType]:
    """All columns, in as many tables of `names` as it takes."""
    left = [column for column in columns if column.width]
    while left:
        room, count = width - 1 - _min_name_width(names, width), 0
        for column in left:
            room -= _column_width(column, break_title=True) + GAP
            count += room >= 0
        count = max(1, count)
        yield _table(names, left[:count], width, break_titles=True)
        left = left[count:]


def _min_name_width(names: Sequence[str], width: int) -> int:
    longest = max(map(cell_len, ("run", *names)))
    return min(longest, MIN_NAME if width >= NARROW else MIN_NAME_NARROW)


def _table(names: Sequence[str], columns: Sequence[Column], width: int, break_titles: bool) -> Table:
    widths = [_column_width(column, break_titles) for column in columns]
    longest = max(map(cell_len, ("run", *names)))
    name_width = max(3, min(longest, width - 1 - sum(column_width + GAP for column_width in widths)))
    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, GAP - 1, 0, 0))
    table.add_column("run", width=name_width, no_wrap=True)
    for column, column_width in zip(columns, widths, strict=True):
        title = Text("\n".join(_title_lines(column, break_titles)))
        table.add_column(title, width=column_width, no_wrap=True, justify="right" if column.right else "left")
    for row, name in enumerate(shortened(names, name_width)):
        table.add_row(Text(name), *(column.cells[row] for column in columns))
    return table


def _column_width(column: Column, break_title: bool) -> int:
    return max(column.width, *map(cell_len, _title_lines(column, break_title)))


def _title_lines(column: Column, break_title: bool) -> list[str]:
    """The lines of a title, no wider than the column's cells where it can be broken at a space, dot or underscore."""
    max_width = max(column.width, MAX_TITLE)
    if not break_title or cell_len(column.title) <= max_width:
        return [column.title]
    lines = [""]
    for part in re.findall(r"[^ ._]*[ ._]|[^ ._]+$", column.title):
        if lines[-1] and len(lines[-1] + part.rstrip()) > max_width:
            lines.append("")
        lines[-1] += part
    return [line.rstrip() for line in lines]
