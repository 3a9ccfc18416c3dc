"""What TensorBoard shows of a run besides its curves: HParams, the layout of custom scalars, and the spec as text.

It is written to one small event file per run, `events.out.tfevents.0.fluxrun`. The file is derived from the run folders
and always rewritten whole, so a resumed run appears once, and a run that failed and was continued appears as done. Its
name sorts before those of the event files with curves: TensorBoard watches only the last file of a folder for new
events.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.core import files
from runner.runs.index import Record, record_of
from runner.runs.run import Run, find_runs
from runner.runs.short_names import short_labels
from runner.runs.spec_differences import distinguishing_keys
from runner.runs.state import RunState, is_number

EVENT_FILE = "events.out.tfevents.0.fluxrun"
MAX_CHECK_BOXES = 12  # for the values of one hyperparameter

METRICS = (
    ("eval/loss", "eval loss"),
    ("run/train_loss", "train loss"),
    ("run/s_per_step", "s/step"),
    ("run/peak_memory_GiB", "peak memory, GiB"),
)
LAYOUT: Mapping[str, Mapping[str, Sequence[str]]] = {
    "Losses": {"eval loss": ["eval/loss"], "train loss": ["train/loss"]},
    "Held-out loss by timestep": {f"sigma 0.{k}": [rf"eval/sigma 0\.{k}"] for k in (1, 3, 5, 7, 9)},
    "Token rows": {
        f"{what}, {encoder}": [f"rows/{what} .* {encoder}"] for encoder in ("clip", "t5") for what in ("norm", "drift")
    },
    "Training": {
        "s/step": ["train/step_seconds"],
        "learning rate": ["lr/.*", "train/lr"],  # train/lr: written by earlier versions, the largest rate
        "gradient norm": ["train/grad_norm"],
    },
}


def write_sessions(runs: Path) -> None:
    """Write the event file of every run that has others, with curves."""
    records = _records(runs)
    keys = distinguishing_keys(records.values())
    for run in find_runs(runs):
        if any(path.name != EVENT_FILE for path in run.folder.glob("events.out.tfevents.*")):
            _write(run, records, keys)


def write_session(run: Run) -> None:
    """Write the event file of one run, when it starts. Its hyperparameters are the keys in which the runs of the folder
    differ."""
    records = _records(run.runs)
    _write(run, records, distinguishing_keys(records.values()))


def _records(runs: Path) -> dict[str, Record]:
    return {run.name: record_of(run) for run in find_runs(runs)}


def _write(run: Run, records: Mapping[str, Record], keys: Sequence[str]) -> None:
    specs = {name: record.spec for name, record in records.items()}
    content, path = _content(run, specs, keys), run.folder / EVENT_FILE
    if not path.is_file() or path.read_bytes() != content:
        files.write_bytes(path, [content], durable=False)


def _content(run: Run, specs: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> bytes:
    """The event file. `specs`: of all runs, by name; `keys`: those in which they differ."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.plugins.custom_scalar import metadata as custom_scalar
    from tensorboard.plugins.hparams import summary_v2 as hp
    from tensorboard.plugins.text import metadata as text
    from tensorboard.summary.writer.record_writer import RecordWriter

    state = run.state()
    label = dict(zip(specs, short_labels(list(specs)), strict=True))[run.name]
    time = float(state.started or 0.0)
    session = {key: _hparam_value(value) for key, value in specs[run.name].items()}
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    writer.write(event_pb2.Event(wall_time=time, file_version="brain.Event:2").SerializeToString())
    for summary in (
        hp.hparams_config_pb(
            hparams=[hp.HParam(key, _domain(values)) for key, values in _distinct_values(specs, keys)],
            metrics=[hp.Metric(tag, display_name=title) for tag, title in METRICS],
            time_created_secs=time,
        ),
        hp.hparams_pb(session, trial_id=label, start_time_secs=time),
        *_session_end(state),
        _text_summary(
            custom_scalar.CONFIG_SUMMARY_TAG, custom_scalar.create_summary_metadata(), _layout().SerializeToString()
        ),
        _text_summary("spec", text.create_summary_metadata("spec", ""), _as_markdown(run.spec_file).encode()),
    ):
        event = event_pb2.Event(wall_time=time, step=0, summary=summary)
        writer.write(event.SerializeToString())
    return buffer.getvalue()


def _text_summary(tag: str, metadata: Any, value: bytes) -> Any:
    """A summary of one string. (The plugins' own `summary` modules need TensorFlow.)"""
    from tensorboard.compat.proto import summary_pb2, tensor_pb2, types_pb2

    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[value])
    return summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])


def _session_end(state: RunState) -> Iterator[Any]:
    """How the run ended, if it is done or failed. A stopped run has not ended: it can be continued."""
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    statuses = {"done": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}
    if state.state in statuses:
        ended = state.updated if state.finished is None else state.finished
        info = plugin_data_pb2.SessionEndInfo(status=statuses[state.state], end_time_secs=float(ended or 0.0))
        summary_metadata = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=info))
        value = summary_pb2.Summary.Value(
            tag=metadata.SESSION_END_INFO_TAG, metadata=summary_metadata, tensor=metadata.NULL_TENSOR
        )
        yield summary_pb2.Summary(value=[value])


def _distinct_values(specs: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """(key, its different values in order) of each key."""
    for key in keys:
        values = {_hparam_value(spec[key]) for spec in specs.values() if key in spec}
        yield key, sorted(values, key=lambda value: (str(type(value)), value))


def _domain(values: Sequence[Any]) -> Any:
    """Check boxes for a few values of one type. None: TensorBoard offers an interval or a pattern instead."""
    from tensorboard.plugins.hparams import summary_v2 as hp

    one_type = len({type(value) for value in values}) == 1
    return hp.Discrete(values) if one_type and len(values) <= MAX_CHECK_BOXES else None


def _hparam_value(value: Any) -> bool | float | str:
    """A value of a type that HParams has."""
    if isinstance(value, bool | str):
        return value
    return float(value) if is_number(value) else str(value)


def _layout() -> Any:
    from tensorboard.plugins.custom_scalar import layout_pb2

    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title=title,
                chart=[
                    layout_pb2.Chart(title=name, multiline=layout_pb2.MultilineChartContent(tag=tags))
                    for name, tags in charts.items()
                ],
            )
            for title, charts in LAYOUT.items()
        ]
    )


def _as_markdown(path: Path) -> str:
    """Markdown that shows a file verbatim."""
    return "".join(f"    {line}\n" for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
