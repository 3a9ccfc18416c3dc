"""Rows of facts as tables that fit the terminal: what is least missed falls out first, numbers are never cut. No torch."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from runner.core.humanize import format_duration
from runner.runs.index import Record, swept_keys
from runner.runs.short_names import shortened

GAP = 2  # between two columns
LEAST_NAME, LEAST_NARROW = 28, 16  # that a name has before columns fall out for it; below NARROW
NARROW = 80
LONGEST_TITLE = 12  # that is never broken
LONGEST_VALUE = 24  # of a spec's value in a column; --csv and the page have all of it
MOST_SPEC_KEYS = 6
PIPE_WIDTH = 200


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the process here with code 1, which fluxrun's say of runs that failed."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def console() -> Console:
    """stdout. A pipe has no width to fold at, unless COLUMNS gives one."""
    free = not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdecimal()
    return _Console(highlight=False, width=PIPE_WIDTH if free else None)


def print_parts(screen: Console, parts: Iterable[RenderableType]) -> None:
    """Print tables folded to the width, and lines in full."""
    for part in parts:
        screen.print(part, soft_wrap=isinstance(part, Text))


# ---- a table of the width there is ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """title; cells: one per row; width: of the widest; keep: the lowest stay longest where room is short, 0 always."""

    title: str
    cells: Sequence[RenderableType]
    width: int
    keep: int
    right: bool = False


def column(
    title: str, cells: Sequence[str | Text], keep: int, *, right: bool = False, limit: int | None = None
) -> Column:
    """Of text; what is longer than `limit` is cut in the middle, different texts staying different."""
    if limit is not None:
        cells = shortened([str(cell) for cell in cells], limit)
    texts = [cell if isinstance(cell, Text) else Text(cell) for cell in cells]  # Text: a run's words are no markup
    return Column(title, texts, max((text.cell_len for text in texts), default=0), keep, right)


def fitted(names: Sequence[str], columns: Iterable[Column], width: int) -> Iterator[RenderableType]:
    """A table of `names` and the columns that fit into `width`, and a line about those that do not. A column without
    any text is none."""
    columns = [one for one in columns if one.width]
    for break_titles in (False, True):
        widths = [_width(one, break_titles) for one in columns]
        room = width - 1 - _least_name(names, width)
        shown = []
        for index in sorted(range(len(columns)), key=lambda index: columns[index].keep):
            if columns[index].keep == 0 or widths[index] + GAP <= room:
                shown.append(index)
                room -= widths[index] + GAP
        if len(shown) == len(columns):
            break
    yield _table(names, [columns[index] for index in sorted(shown)], width, break_titles)
    if missing := [one.title for index, one in enumerate(columns) if index not in shown and one.title]:
        yield Text(f"not shown for lack of room: {', '.join(missing)}", style="dim")


def wrapped(names: Sequence[str], columns: Iterable[Column], width: int) -> Iterator[RenderableType]:
    """The same with every column, in as many tables as it takes."""
    left = [one for one in columns if one.width]
    while left:
        room, count = width - 1 - _least_name(names, width), 0
        for one in left:
            room -= _width(one, break_title=True) + GAP
            count += room >= 0
        yield _table(names, left[: max(1, count)], width, break_titles=True)
        left = left[max(1, count) :]


def _least_name(names: Sequence[str], width: int) -> int:
    longest = max(map(cell_len, ("run", *names)))
    return min(longest, LEAST_NAME if width >= NARROW else LEAST_NARROW)


def _table(names: Sequence[str], columns: Sequence[Column], width: int, break_titles: bool) -> Table:
    widths = [_width(one, break_titles) for one in columns]
    longest = max(map(cell_len, ("run", *names)))
    name_width = max(3, min(longest, width - 1 - sum(each + GAP for each in widths)))
    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, GAP - 1, 0, 0))
    table.add_column("run", width=name_width, no_wrap=True)
    for one, each in zip(columns, widths, strict=True):
        head = Text("\n".join(_head(one, break_titles)))
        table.add_column(head, width=each, no_wrap=True, justify="right" if one.right else "left")
    for number, name in enumerate(shortened(names, name_width)):
        table.add_row(Text(name), *(one.cells[number] for one in columns))
    return table


def _width(one: Column, break_title: bool) -> int:
    return max(one.width, *map(cell_len, _head(one, break_title)))


def _head(one: Column, break_it: bool) -> list[str]:
    """The lines of a column's title, no longer than its cells where that can be."""
    most = max(one.width, LONGEST_TITLE)
    if not break_it or cell_len(one.title) <= most:
        return [one.title]
    lines = [""]
    for part in re.findall(r"[^ ._]*[ ._]|[^ ._]+$", one.title):
        if lines[-1] and len(lines[-1] + part.rstrip()) > most:
            lines.append("")
        lines[-1] += part
    return [line.rstrip() for line in lines]


# ---- what is told of runs ------------------------------------------------------------------------------------------


def results_table(records: Sequence[Record], keys: Sequence[str], width: int) -> Iterator[RenderableType]:
    """`keys`: those that are worth a column, the most telling first. What was swept stands before the numbers, what is long
    (paths, commands, addresses) behind them."""
    swept = swept_keys(records)
    specs = [_spec_column(key, records, number, swept) for number, key in enumerate(keys[:MOST_SPEC_KEYS])]
    exported = [_whole(one.exported_step if one.exported_step != one.step else None) for one in records]
    yield from fitted(
        [one.name for one in records],
        [
            column("state", [one.state for one in records], 0),
            column("eval loss", [number_text(one.eval_loss, ".4f") for one in records], 0, right=True),
            *(one for one in specs if one.keep < LONG),
            column("train loss", [number_text(one.train_loss, ".4f") for one in records], 4, right=True),
            column("steps", [steps_text(one) for one in records], 3, right=True),
            column("exported step", exported, 5, right=True),
            column("s/step", [number_text(one.s_per_step, ".3g") for one in records], 6, right=True),
            column("wall", [_wall(one.wall_s) for one in records], 6, right=True),
            column("peak memory", [_memory(one.peak_memory_bytes) for one in records], 7, right=True),
            column("exports", [str(len(one.exports) or "") for one in records], 8, right=True),
            *(one for one in specs if one.keep >= LONG),
        ],
        width,
    )
    yield from reasons({one.name: one.error or one.ended or one.warning for one in records})


def status_table(states: Sequence[Mapping[str, Any]], width: int) -> Iterator[RenderableType]:
    """`states`: what each run's state.json says."""
    yield from fitted(
        [state["name"] for state in states],
        [
            column("state", [state["state"] for state in states], 0),
            column("phase", [state.get("phase", "") for state in states], 3),
            column("step", [f"{_whole(state.get('step', 0))}/{_whole(state.get('steps')) or '?'}" for state in states], 0, right=True),
            column("loss", [number_text(state.get("train_loss"), ".4f") for state in states], 2, right=True),
            column("s/step", [number_text(state.get("s_per_step"), ".3g") for state in states], 4, right=True),
            column("wall", [_wall(state.get("wall_s")) for state in states], 5, right=True),
        ],
        width,
    )  # fmt: skip
    yield from reasons(
        {state["name"]: state.get("error") or state.get("ended") or state.get("warning") for state in states}
    )


def reasons(told: Mapping[str, str | None]) -> Iterator[Text]:
    """Why runs failed, stopped or ended early: a line for each reason, below a table that has no room for it."""
    by_text: dict[str, list[str]] = {}
    for name, text in told.items():
        if text:
            by_text.setdefault(text, []).append(name)
    for text, names in by_text.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield Text(f"{', '.join(names[:3])}{more}: {text}")


LONG = 9  # `keep` of a column of long texts


def _spec_column(key: str, records: Sequence[Record], number: int, swept: Iterable[str]) -> Column:
    values = [spec_text(one.spec.get(key)) for one in records]
    if key in swept:
        keep = 1
    elif max(map(len, values), default=0) > LONGEST_VALUE or any("/" in value for value in values):
        keep = LONG
    else:
        keep = 2 if number < 2 else LONG - 1
    return column(key, values, keep, limit=LONGEST_VALUE)


def spec_text(value: Any) -> str:
    """A spec's value as TOML has it, without quotes."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(spec_text, value)) if isinstance(value, list) else str(value)


def steps_text(record: Record) -> str:
    """ "700", or "300/700" of a run that is not done."""
    if record.state == "done":
        return _whole(record.steps)
    return f"{_whole(record.step or 0)}/{_whole(record.steps) or '?'}"


def number_text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _wall(seconds: float | None) -> str:
    return format_duration(seconds) if seconds else ""


def _memory(size: float | None) -> str:
    return f"{size / 2**30:.2f} GiB" if size else ""
