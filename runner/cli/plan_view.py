"""The plan of a night as a picture for a terminal: a table of runs, their phases as bars, when each and all will end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from runner.core import hardware
from runner.core.command_line import fluxrun_command
from runner.core.humanize import format_bytes, format_duration
from runner.data.buckets import Size
from runner.jobs.cache_hits import queue_bytes
from runner.jobs.card_fit import Estimates, lines
from runner.jobs.job import Job
from runner.jobs.timing import TimeEstimate
from runner.report.tables import GAP, LEAST_NAME, LEAST_NARROW, NARROW
from runner.runs.short_names import shortened

BAR, NARROW_BAR, NARROWEST_BAR = 24, 16, 10
LONGEST_NAME = 56
REASON = 40  # characters of a line that says why a run runs, where there is room
WIDE = 118  # columns from which a terminal has room for everything
ONLY_WIDE = ("disk", "memory", "s/step")
COLOURS = {"joint": "magenta", "lora": "cyan", "inversion": "yellow"}
STATES = {"done": "green", "resume": "yellow", "running": "cyan", "waiting": "cyan", "new": "bold", "changed": "red"}


def draw(
    console: Console, jobs: Sequence[Job], times: Sequence[TimeEstimate], cached: Mapping[str, str], now: float, *,
    on_gpu: bool = True,
) -> None:  # fmt: skip
    """`cached`: what there is in the cache, by run; `now`: when the night begins, seconds since 1970. Runs are taken to go
    one after the other."""
    console.print(_table(jobs, times, now, console.width))
    lines = (*_sweeps(jobs), *_images(jobs), *_same(cached), *_memory(jobs, on_gpu), *_notes(jobs))
    told = (Text(line) for line in lines)
    for line in (*told, *_sum(jobs, times, now, on_gpu)):
        console.print(line, soft_wrap=True)


def _table(jobs: Sequence[Job], times: Sequence[TimeEstimate], now: float, width: int) -> Table:
    wide = width >= WIDE
    longest = max((job.plan.steps for job in jobs), default=1)
    rows = []
    end: float | None = now
    for job, own in zip(jobs, times, strict=True):
        end = None if end is None or own.seconds is None else end + own.seconds
        rows.append(_numbers(job, own, end, now))
    shown = [title for title in rows[0] if any(row[title] for row in rows) and (wide or title not in ONLY_WIDE)]
    numbers = sum(max(len(title), *(len(row[title]) for row in rows)) + GAP for title in shown)
    bar = BAR if wide else NARROW_BAR if width >= NARROW else NARROWEST_BAR
    room = max(LEAST_NARROW, width - numbers - bar - GAP - 1)  # for the names
    lines = 2 if room < LEAST_NAME else 1
    names = shortened([job.plan.name for job in jobs], min(lines * room, LONGEST_NAME))
    table = Table(box=box.SIMPLE, padding=(0, GAP - 1, 0, 0), show_edge=False)
    table.add_column("run", overflow="fold", width=min(room, max(REASON, *map(cell_len, names))))
    table.add_column("phases", overflow="fold", min_width=bar)
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for job, own, row, name in zip(jobs, times, rows, names, strict=True):
        table.add_row(_run(job, own, name), _phases(job, own, longest, bar), *(row[title] for title in shown))
    return table


def _numbers(job: Job, own: TimeEstimate, end: float | None, now: float) -> dict[str, str]:
    """The cells of one row; a column without any is left out. "?" is what no earlier run tells."""
    todo, about = own.left > 0, "~" if own.about else ""
    left = f"{own.left}" if own.left in (0, job.plan.steps) else f"{own.left} of {job.plan.steps}"
    return {
        "steps": left,
        "disk": format_bytes(job.plan.disk_bytes) if todo else "",
        "memory": format_bytes(own.peak) if own.peak and todo else "",
        "s/step": f"{about}{own.s_per_step:.3g}" if own.s_per_step else "",
        "takes": "" if not todo else "?" if own.seconds is None else about + format_duration(own.seconds),
        "ends": "" if not todo else "?" if end is None else _when(end, now),
    }


def _run(job: Job, own: TimeEstimate, name: str) -> Text:
    """Name; state; why."""
    at = job.plan.steps - own.left
    where = f" at step {at}" if job.status.state == "resume" and own.left else ""
    said = Text(name)
    said.append(f"\n  {job.status.state}{where}", style=STATES.get(job.status.state, ""))
    return said.append(f": {job.status.reason}", style="not bold dim")


def _phases(job: Job, own: TimeEstimate, longest: int, most: int) -> Group:
    """A bar as long as the run's share of the longest one's steps, shaded where it is done; names and steps below."""
    at, bar, words = job.plan.steps - own.left, Text(), Text()
    cells = max(len(job.plan.training), round(most * job.plan.steps / longest))
    for phase in job.plan.training:
        colour = COLOURS[phase.kind]
        first, last = (round(cells * step / job.plan.steps) for step in (phase.start, phase.stop))
        done = min(last, max(first, round(cells * at / job.plan.steps)))
        bar.append("░" * (done - first) + "█" * max(last - done, int(last == first)), style=colour)
        words.append(f"{', ' if words else ''}{phase.name} {phase.start + 1}-{phase.stop}", style=colour)
    return Group(bar, words)


def _sum(jobs: Sequence[Job], times: Sequence[TimeEstimate], now: float, on_gpu: bool) -> Iterator[Text]:
    left = sum(own.left for own in times)
    todo = [job for job, own in zip(jobs, times, strict=True) if own.left]
    disk = sum(queue_bytes(todo, on_gpu=on_gpu and hardware.NVIDIA.is_dir()))
    said = Text(
        f"{_count(len(jobs), 'run')}, {len(todo)} to do: {left} steps, about {format_bytes(disk)}", style="bold"
    )
    unknown = [job for job, own in zip(jobs, times, strict=True) if own.seconds is None]
    if not todo:
        yield said
    elif unknown:
        yield said.append("; when it ends is unknown", style="bold")
        names = [job.plan.name for job in unknown]
        measure = fluxrun_command("check", *dict.fromkeys(job.file for job in unknown[:3]), "--step")
        yield Text(
            "? no earlier run on this machine has the same base and size, so the time of a step is not known "
            f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); `{measure}` measures it",
            style="dim",
        )
    else:
        seconds = sum(own.seconds or 0.0 for own in times)
        yield said.append(
            f"; ends {_when(now + seconds, now)}, in {format_duration(seconds)}, if begun now", style="bold"
        )
    if any(own.about for own in times):
        yield Text("~ by an earlier run with another batch", style="dim")


def _sweeps(jobs: Sequence[Job]) -> Iterator[str]:
    """What each [sweep] came to: its keys, their values, how many runs."""
    for file, group in groupby((job for job in jobs if job.source.swept), key=lambda job: job.file):
        runs = list(group)
        values: dict[str, list[str]] = {}
        for job in runs:
            for key, value in job.source.swept.items():
                values.setdefault(key, [])
                if str(value) not in values[key]:
                    values[key].append(str(value))
        product = " × ".join(f"{key} = {', '.join(found)}" for key, found in values.items())
        yield f"sweep of {file}: {product}: {_count(len(runs), 'run')}"


def sweep_line(swept: Mapping[str, Any]) -> str:
    """One run's part of it."""
    return ", ".join(f"{key} = {value}" for key, value in swept.items())


def _images(jobs: Sequence[Job]) -> Iterator[str]:
    yield from _same({job.plan.name: f"images: {sizes_line(job.plan.sizes)}" for job in jobs})


def _memory(jobs: Sequence[Job], on_gpu: bool) -> Iterator[str]:
    """What the runs that are to do will need, by formula."""
    estimates = Estimates(on_gpu=on_gpu)
    told: dict[str, list[str]] = {job.plan.name: list(lines(job, estimates)) for job in jobs if not job.is_done}
    for index in range(max((len(found) for found in told.values()), default=0)):
        yield from _same({name: found[index] for name, found in told.items() if index < len(found)})


def _notes(jobs: Sequence[Job]) -> Iterator[str]:
    for note in dict.fromkeys(note for job in jobs for note in job.plan.notes):
        yield from _same({job.plan.name: f"note: {note}" for job in jobs if note in job.plan.notes})


def sizes_line(sizes: Mapping[Size, int] | None) -> str:
    """The bucket table."""
    if sizes is None:
        return "counted when the data set is here"
    table = ", ".join(f"{count} at {width}x{height}" for (width, height), count in sizes.items())
    return f"{table}; none is dropped{', no batch mixes sizes' if len(sizes) > 1 else ''}"


def _same(told: Mapping[str, str]) -> Iterator[str]:
    """What several runs have in common is told once."""
    by_text: dict[str, list[str]] = {}
    for name, text in told.items():
        by_text.setdefault(text, []).append(name)
    for text, names in by_text.items():
        whose = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if len(by_text) > 1 else ""
        yield f"{text}{whose}"


def _when(at: float, now: float) -> str:
    there, today = time.localtime(at), time.localtime(now)
    return time.strftime("%H:%M" if there[:3] == today[:3] else "%a %H:%M", there)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
