"""The results page: all runs of a folder in one HTML file, which opens from disk without a network.

Text from specs, captions and logs reaches the page in two ways only: through Jinja's autoescape, and as JSON that the
page's script writes into text nodes. A content security policy allows no script but the two in `template/`.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from runner.core import files
from runner.core.humanize import format_duration
from runner.report.curves import curves
from runner.report.details import details
from runner.report.page_run import PageRun, read_page_runs
from runner.report.sample_grid import sample_grid
from runner.report.values import duration_text, is_long, number_text, spec_text, steps_text
from runner.runs.index import Record
from runner.runs.spec_differences import distinguishing_keys, have_comparable_losses, swept_keys

TEMPLATE = Path(__file__).parent / "template"
STATES = ("done", "running", "waiting", "stopped", "failed")  # in the order of the summary


def write_report(runs: Path) -> Path:
    """Write RUNS/index.html and return its path."""
    html = render(runs).encode(errors="replace").decode()  # a folder's name may hold bytes that are no UTF-8
    files.write_text(files.make_folder(runs) / "index.html", html)
    return runs / "index.html"


def render(runs: Path) -> str:
    """The page's HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    page_runs = read_page_runs(runs)
    records = [page_run.record for page_run in page_runs]
    keys = distinguishing_keys(records)
    swept, long = swept_keys(records), _long_keys(keys, records)
    first_keys = [key for key in keys if key in swept or key not in long]
    comparable = have_comparable_losses(record.spec for record in records)
    scripts = [(TEMPLATE / name).read_text(encoding="utf-8") for name in ("uPlot.iife.min.js", "report.js")]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        css=[Markup((TEMPLATE / name).read_text(encoding="utf-8")) for name in ("uPlot.min.css", "report.css")],
        scripts=[Markup(script) for script in scripts],
        hashes=[_csp_hash(script) for script in scripts],
        data={"compares": comparable, "runs": list(map(curves, page_runs)), "shots": sample_grid(runs, page_runs)},
        first_keys=first_keys,
        last_keys=[key for key in keys if key not in first_keys],
        rows=[_row(page_run) for page_run in page_runs],
        compares=comparable,
        details=[details(page_run, runs) for page_run in page_runs],
        summary=_summary(page_runs),
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=version("fluxrun"),
    )


def _long_keys(keys: Sequence[str], records: Sequence[Record]) -> set[str]:
    """Keys with long values (paths, commands, addresses), which would push the numbers out of sight."""
    return {key for key in keys if any(is_long(spec_text(record.spec.get(key))) for record in records)}


def _csp_hash(script: str) -> str:
    """The script's source expression in the content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _row(page_run: PageRun) -> dict[str, Any]:
    """A row of the table; its numbers as (text, value to sort by)."""
    record = page_run.record
    memory = record.peak_memory_bytes
    return {
        "name": page_run.run.name,
        "label": page_run.label,
        "shown": page_run.short_label,
        "state": record.state,
        "spec": {key: (spec_text(value), value if _is_number(value) else None) for key, value in record.spec.items()},
        "eval": (number_text(record.eval_loss, ".4f"), record.eval_loss),
        "train": (number_text(record.train_loss, ".4f"), record.train_loss),
        "steps": (steps_text(record), page_run.step),
        "pace": (number_text(record.s_per_step, ".3g"), record.s_per_step),
        "wall": (duration_text(record.wall_s), record.wall_s),
        "memory": (number_text(memory and memory / 2**30, ".2f"), memory),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _summary(page_runs: Sequence[PageRun]) -> dict[str, Any]:
    """The line at the top: how many runs are in which state, their training time, and the run with the lowest eval
    loss."""
    records = [page_run.record for page_run in page_runs]
    states: dict[str, int] = {}
    for record in records:
        states[record.state] = states.get(record.state, 0) + 1
    losses = {index: record.eval_loss for index, record in enumerate(records) if record.eval_loss is not None}
    best = min(losses, key=losses.__getitem__) if losses else None
    return {
        "count": len(page_runs),
        "states": sorted(states.items(), key=lambda item: STATES.index(item[0]) if item[0] in STATES else len(STATES)),
        "wall": format_duration(sum(record.wall_s or 0.0 for record in records)),
        "best": None if best is None else {"label": page_runs[best].label, "at": best, "loss": f"{losses[best]:.4f}"},
        "failed": [record.name for record in records if record.state == "failed"],
    }
