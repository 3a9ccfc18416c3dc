"""The details of a run on the results page: facts, links, commands, and the end of the log of a run that is not
done."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner.core.command_line import fluxrun_command
from runner.report.page_run import PageRun, link
from runner.report.values import spec_text

LOG_LINES = 25


def details(page_run: PageRun, runs: Path) -> dict[str, Any]:
    """What the template shows of one run."""
    run, record = page_run.run, page_run.record
    exports = [run.folder / name for name in record.exports]
    inside = [path for path in exports if path.is_file() and path.resolve().is_relative_to(run.folder.resolve())]
    others = [run.samples / "before-after.png", run.spec_file, run.log_file, run.history_file]
    facts = {
        "state": record.state,
        "phase": page_run.phase,
        "steps": f"{page_run.step} of {record.steps or '?'}",
        "started": _time_text(record.started),
        "finished": _time_text(record.finished),
        "ended early": record.ended or "",
        "best step": str(record.best_step or ""),
        "exported step": str(record.exported_step or ""),
        "warning": record.warning or "",
        "attempts": str(record.attempts or ""),
        "base": record.base or "",
        "versions": ", ".join(f"{name} {number}" for name, number in record.versions.items()),
    }
    return {
        **asdict(record),
        "label": page_run.label,
        "facts": {key: value for key, value in facts.items() if value},
        "log": [] if record.state == "done" else _last_lines(run.log_file),
        "exports": [(path.name, link(path, runs)) for path in inside],
        "links": [(path.name, link(path, runs)) for path in others if path.is_file()],
        "commands": _commands(page_run, runs),
        "spec": {key: spec_text(value) for key, value in record.spec.items()},
    }


def _commands(page_run: PageRun, runs: Path) -> list[tuple[str, str]]:
    """(title, command), to be typed in the folder where fluxrun is running now.

    A folder that --fresh moved aside has no commands of its own: its spec names the run that took its place.
    """
    run, record = page_run.run, page_run.record
    commands = []
    if not run.is_archived():
        if record.state != "done":
            allow = ["--allow-commands"] if record.spec.get("notify.command") else []
            commands.append(("continue", ["queue", str(run.spec_file), *allow]))
        if record.exports:
            prompts = record.spec.get("validate.prompts") or ["..."]
            commands.append(("more pictures", ["sample", run.name, "--prompt", str(prompts[0]), "--count", "4"]))
        if record.steps and run.checkpoint_files():
            commands.append(("export again", ["export", run.name]))
    commands.append(("watch in TensorBoard", ["board"]))
    return [(title, fluxrun_command(*words, runs=runs)) for title, words in commands]


def _last_lines(path: Path) -> list[str]:
    """The last LOG_LINES lines of a file, of which only the end is read; [] if there is none."""
    if not path.is_file() or path.is_symlink():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 300 * LOG_LINES))
        return file.read().decode(errors="replace").splitlines()[-LOG_LINES:]


def _time_text(moment: float | None) -> str:
    """ "2026-01-31 02:13"; "" for None and for what is no time."""
    try:
        return "" if moment is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
    except (ValueError, OverflowError, OSError):
        return ""
