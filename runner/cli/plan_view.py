"""The plan of a queue on a terminal: a table of runs with their phases as bars, and when each run and the queue will
end."""

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
from runner.core.humanize import format_bytes, format_duration, pluralize
from runner.data.buckets import Size
from runner.jobs.card_fit import Estimates, lines
from runner.jobs.disk_need import queue_bytes
from runner.jobs.job import Job
from runner.jobs.timing import TimeEstimate
from runner.report.tables import GAP, MIN_NAME, MIN_NAME_NARROW, NARROW
from runner.runs.short_names import shortened

# Widths in characters.
BAR, BAR_NARROW, BAR_NARROWEST = 24, 16, 10
MAX_NAME = 56
REASON = 40  # of a line that says why a run will run, where there is room
WIDE = 118  # a terminal at least this wide shows every column
ONLY_WIDE = ("disk", "memory", "s/step")
COLOURS = {"joint": "magenta", "lora": "cyan", "inversion": "yellow"}
STATES = {"done": "green", "resume": "yellow", "running": "cyan", "waiting": "cyan", "new": "bold", "changed": "red"}


def print_plan(
    console: Console, jobs: Sequence[Job], times: Sequence[TimeEstimate], cached: Mapping[str, str], now: float, *,
    on_gpu: bool = True,
) -> None:  # fmt: skip
    """Print the table, notes and totals.

    times: one per job. cached: by run name, a line about its cache entries. now: when the queue starts, in seconds since
    1970. Runs are assumed to run one after the other.
    """
    console.print(_table(jobs, times, now, console.width))
    notes = (*_sweeps(jobs), *_images(jobs), *_merged(cached), *_memory(jobs, on_gpu), *_notes(jobs))
    for line in (*map(Text, notes), *_totals(jobs, times, now, on_gpu)):
        console.print(line, soft_wrap=True)


def sizes_line(sizes: Mapping[Size, int] | None) -> str:
    """The buckets of a data set: "10 at 64x64, 4 at 96x64; ..."."""
    if sizes is None:
        return "counted when the data set is here"
    buckets = ", ".join(f"{count} at {width}x{height}" for (width, height), count in sizes.items())
    return f"{buckets}; none is dropped{', no batch mixes sizes' if len(sizes) > 1 else ''}"


def sweep_line(swept: Mapping[str, Any]) -> str:
    """The values that one run has of a sweep: "lora.rank = 4, train.lr = 0.001"."""
    return ", ".join(f"{key} = {value}" for key, value in swept.items())


# ---- the table -----------------------------------------------------------------------------------------------------


def _table(jobs: Sequence[Job], times: Sequence[TimeEstimate], now: float, width: int) -> Table:
    """A row per job: its name, state and phases, and the number columns that have a value and fit `width`."""
    wide = width >= WIDE
    max_steps = max((job.plan.steps for job in jobs), default=1)
    rows = []
    end: float | None = now
    for job, estimate in zip(jobs, times, strict=True):
        end = None if end is None or estimate.seconds is None else end + estimate.seconds
        rows.append(_number_cells(job, estimate, end, now))
    titles = [title for title in rows[0] if any(row[title] for row in rows) and (wide or title not in ONLY_WIDE)]
    numbers_width = sum(max(len(title), *(len(row[title]) for row in rows)) + GAP for title in titles)
    bar_width = BAR if wide else BAR_NARROW if width >= NARROW else BAR_NARROWEST
    name_width = max(MIN_NAME_NARROW, width - numbers_width - bar_width - GAP - 1)
    name_lines = 2 if name_width < MIN_NAME else 1
    names = shortened([job.plan.name for job in jobs], min(name_lines * name_width, MAX_NAME))
    table = Table(box=box.SIMPLE, padding=(0, GAP - 1, 0, 0), show_edge=False)
    table.add_column("run", overflow="fold", width=min(name_width, max(REASON, *map(cell_len, names))))
    table.add_column("phases", overflow="fold", min_width=bar_width)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for job, estimate, row, name in zip(jobs, times, rows, names, strict=True):
        phases = _phases_cell(job, estimate, max_steps, bar_width)
        table.add_row(_run_cell(job, estimate, name), phases, *(row[title] for title in titles))
    return table


def _number_cells(job: Job, estimate: TimeEstimate, end: float | None, now: float) -> dict[str, str]:
    """The cells of a row by column title; "?" where no earlier run tells how long it takes."""
    todo, about = estimate.steps_left > 0, "~" if estimate.is_scaled else ""
    steps = job.plan.steps
    return {
        "steps": f"{estimate.steps_left}" if estimate.steps_left in (0, steps) else f"{estimate.steps_left} of {steps}",
        "disk": format_bytes(job.plan.disk_bytes) if todo else "",
        "memory": format_bytes(estimate.peak) if estimate.peak and todo else "",
        "s/step": f"{about}{estimate.s_per_step:.3g}" if estimate.s_per_step else "",
        "takes": "" if not todo else "?" if estimate.seconds is None else about + format_duration(estimate.seconds),
        "ends": "" if not todo else "?" if end is None else _clock(end, now),
    }


def _run_cell(job: Job, estimate: TimeEstimate, name: str) -> Text:
    """The run's name; below it, its state and why."""
    state, step = job.status.state, job.plan.steps - estimate.steps_left
    at_step = f" at step {step}" if state == "resume" and estimate.steps_left else ""
    cell = Text(name)
    cell.append(f"\n  {state}{at_step}", style=STATES.get(state, ""))
    return cell.append(f": {job.status.reason}", style="not bold dim")


def _phases_cell(job: Job, estimate: TimeEstimate, max_steps: int, max_width: int) -> Group:
    """A bar as long as the run's share of `max_steps`, shaded where it is done; below it, the phases and their
    steps."""
    step, bar, words = job.plan.steps - estimate.steps_left, Text(), Text()
    width = max(len(job.plan.training), round(max_width * job.plan.steps / max_steps))
    for phase in job.plan.training:
        colour = COLOURS[phase.kind]
        first, last = (round(width * at / job.plan.steps) for at in (phase.start, phase.stop))
        done = min(last, max(first, round(width * step / job.plan.steps)))
        bar.append("░" * (done - first) + "█" * max(last - done, int(last == first)), style=colour)
        words.append(f"{', ' if words else ''}{phase.name} {phase.start + 1}-{phase.stop}", style=colour)
    return Group(bar, words)


# ---- the lines below it --------------------------------------------------------------------------------------------


def _sweeps(jobs: Sequence[Job]) -> Iterator[str]:
    """For each spec with a [sweep]: its keys, their values, and the number of runs."""
    for file, group in groupby((job for job in jobs if job.source.swept), key=lambda job: job.file):
        runs = list(group)
        values: dict[str, dict[str, None]] = {}  # ordered sets
        for job in runs:
            for key, value in job.source.swept.items():
                values.setdefault(key, {})[str(value)] = None
        product = " × ".join(f"{key} = {', '.join(texts)}" for key, texts in values.items())
        yield f"sweep of {file}: {product}: {pluralize(len(runs), 'run')}"


def _images(jobs: Sequence[Job]) -> Iterator[str]:
    yield from _merged({job.plan.name: f"images: {sizes_line(job.plan.sizes)}" for job in jobs})


def _memory(jobs: Sequence[Job], on_gpu: bool) -> Iterator[str]:
    """The estimated memory of the runs that are not done."""
    estimates = Estimates(on_gpu=on_gpu)
    by_run = {job.plan.name: list(lines(job, estimates)) for job in jobs if job.status.state != "done"}
    for index in range(max(map(len, by_run.values()), default=0)):
        yield from _merged({name: texts[index] for name, texts in by_run.items() if index < len(texts)})


def _notes(jobs: Sequence[Job]) -> Iterator[str]:
    for note in dict.fromkeys(note for job in jobs for note in job.plan.notes):
        yield from _merged({job.plan.name: f"note: {note}" for job in jobs if note in job.plan.notes})


def _merged(lines_by_run: Mapping[str, str]) -> Iterator[str]:
    """Each different line once, followed by the names of its runs if there are several lines."""
    by_text: dict[str, list[str]] = {}
    for name, text in lines_by_run.items():
        by_text.setdefault(text, []).append(name)
    for text, names in by_text.items():
        yield f"{text} ({_first_three(names)})" if len(by_text) > 1 else text


def _totals(jobs: Sequence[Job], times: Sequence[TimeEstimate], now: float, on_gpu: bool) -> Iterator[Text]:
    """How much there is to do, and when the queue ends if it starts now."""
    todo = [job for job, estimate in zip(jobs, times, strict=True) if estimate.steps_left]
    unknown = [job for job, estimate in zip(jobs, times, strict=True) if estimate.seconds is None]
    steps = sum(estimate.steps_left for estimate in times)
    disk = format_bytes(sum(queue_bytes(todo, on_gpu=on_gpu and hardware.NVIDIA.is_dir())))
    total = f"{pluralize(len(jobs), 'run')}, {len(todo)} to do: {steps} steps, about {disk}"
    if not todo:
        yield Text(total, style="bold")
    elif unknown:
        yield Text(f"{total}; when it ends is unknown", style="bold")
        measure = fluxrun_command("check", *dict.fromkeys(job.file for job in unknown[:3]), "--step")
        yield Text(
            "? no earlier run on this machine has the same base and size, so the time of a step is not known "
            f"({_first_three([job.plan.name for job in unknown])}); `{measure}` measures it",
            style="dim",
        )
    else:
        seconds = sum(estimate.seconds or 0.0 for estimate in times)
        ends = f"; ends {_clock(now + seconds, now)}, in {format_duration(seconds)}, if started now"
        yield Text(total + ends, style="bold")
    if any(estimate.is_scaled for estimate in times):
        yield Text("~ from an earlier run with another batch size", style="dim")


def _first_three(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _clock(moment: float, now: float) -> str:
    """ "22:31", or with the weekday if that is not today: "Tue 06:10"."""
    local, today = time.localtime(moment), time.localtime(now)
    return time.strftime("%H:%M" if local[:3] == today[:3] else "%a %H:%M", local)
