"""Tables of runs on a terminal: what `fluxrun results` and `fluxrun status` print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import RenderableType
from rich.text import Text

from runner.report.tables import Column, column, fitted
from runner.report.values import MAX_VALUE, duration_text, is_long, number_text, spec_text, steps_text, whole_text
from runner.runs.index import Record
from runner.runs.spec_differences import swept_keys
from runner.runs.state import RunState

MAX_SPEC_KEYS = 6
LONG = 9  # drop_order of a column of long texts


def results_table(records: Sequence[Record], keys: Sequence[str], width: int) -> Iterator[RenderableType]:
    """A table of records, and why runs failed or stopped.

    keys: the spec keys that tell the runs apart, the most important first. Those with long values (paths, commands,
    addresses) come after the numbers.
    """
    swept = swept_keys(records)
    specs = [_spec_column(key, records, index, swept) for index, key in enumerate(keys[:MAX_SPEC_KEYS])]
    exported = [record.exported_step if record.exported_step != record.step else None for record in records]
    yield from fitted(
        [record.name for record in records],
        [
            column("state", [record.state for record in records], 0),
            column("eval loss", [number_text(record.eval_loss, ".4f") for record in records], 0, right=True),
            *(spec for spec in specs if spec.drop_order < LONG),
            column("train loss", [number_text(record.train_loss, ".4f") for record in records], 4, right=True),
            column("steps", [steps_text(record) for record in records], 3, right=True),
            column("exported step", list(map(whole_text, exported)), 5, right=True),
            column("s/step", [number_text(record.s_per_step, ".3g") for record in records], 6, right=True),
            column("wall", [duration_text(record.wall_s) for record in records], 6, right=True),
            column("peak memory", [_gib_text(record.peak_memory_bytes) for record in records], 7, right=True),
            column("exports", [str(len(record.exports) or "") for record in records], 8, right=True),
            *(spec for spec in specs if spec.drop_order >= LONG),
        ],
        width,
    )
    yield from reasons({record.name: record.error or record.ended or record.warning for record in records})


def status_table(states: Mapping[str, RunState], width: int) -> Iterator[RenderableType]:
    """A table of run states, by the run's name, and why runs failed, stopped or ended early."""
    shown = states.values()
    yield from fitted(
        list(states),
        [
            column("state", [state.state for state in shown], 0),
            column("phase", [state.phase or "" for state in shown], 3),
            column("step", [f"{whole_text(state.step or 0)}/{whole_text(state.steps) or '?'}" for state in shown], 0, right=True),
            column("loss", [number_text(state.train_loss, ".4f") for state in shown], 2, right=True),
            column("s/step", [number_text(state.s_per_step, ".3g") for state in shown], 4, right=True),
            column("wall", [duration_text(state.wall_s) for state in shown], 5, right=True),
        ],
        width,
    )  # fmt: skip
    yield from reasons({name: state.error or state.ended or state.warning for name, state in states.items()})


def reasons(text_by_run: Mapping[str, str | None]) -> Iterator[Text]:
    """Why runs failed, stopped or ended early: a line for each reason, with the runs it holds for."""
    runs_by_text: dict[str, list[str]] = {}
    for name, text in text_by_run.items():
        if text:
            runs_by_text.setdefault(text, []).append(name)
    for text, names in runs_by_text.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield Text(f"{', '.join(names[:3])}{more}: {text}")


def _spec_column(key: str, records: Sequence[Record], index: int, swept: Iterable[str]) -> Column:
    """`index`: the key's place among those that tell the runs apart."""
    values = [spec_text(record.spec.get(key)) for record in records]
    if key in swept:
        drop_order = 1
    elif any(map(is_long, values)):
        drop_order = LONG
    else:
        drop_order = 2 if index < 2 else LONG - 1
    return column(key, values, drop_order, limit=MAX_VALUE)


def _gib_text(bytes_: float | None) -> str:
    return f"{bytes_ / 2**30:.2f} GiB" if bytes_ else ""
