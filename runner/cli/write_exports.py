"""`fluxrun export`: a run's exports made again, from any checkpoint, whatever state the run is in."""

from __future__ import annotations

from pathlib import Path

from runner.checkpoint import storage
from runner.checkpoint.storage import Checkpoint
from runner.core.command_line import fluxrun_command
from runner.core.errors import BadFileError, FluxrunError
from runner.core.events import EventLog
from runner.core.signals import StopRequest
from runner.model.flux1 import loading
from runner.runs.index import write_index
from runner.runs.run import Run, read_spec
from runner.training.context import open_base, open_cache
from runner.training.model_pool import ModelPool
from runner.training.phases.export import ExportRequest, export_phase, push
from runner.training.recorder import export_facts


def write_exports(
    runs: Path, name: str, step: int | None, *, gpus: str | None, push_too: bool, event_log: EventLog
) -> list[Path]:
    """Write `export/` from the newest checkpoint, or that of `step`, and return its weight files. The run's state stays
    what it is. Raises FluxrunError where there is no such checkpoint, Held while another process works on the run."""
    run = Run(runs, name)
    if not run.spec_file.is_file():
        raise FluxrunError(f"{run.folder}: no such run; `{fluxrun_command('status', runs=runs)}` names those there are")
    run.refuse_if_locked()
    with run.locked(), StopRequest() as stop:
        run.attempt = run.lease().attempt  # no attempt of its own: it trains nothing
        spec = read_spec(run.spec_file)
        made = _checkpoint(run, step, event_log)
        event_log.line(f"{name}: exporting step {made.step}")
        loading.quiet()
        cache = open_cache(run.runs)
        order = ExportRequest(run, spec, open_base(spec, gpus, cache), event_log, stop, cache, ModelPool())
        delivered = export_phase(order, made)
        run.update_state(**export_facts(run, delivered))
        if push_too:
            push(order)
    write_index(runs)
    return [run.export / file for file in sorted(delivered.errors)]


def _checkpoint(run: Run, step: int | None, event_log: EventLog) -> Checkpoint:
    there = run.checkpoint_files()
    if step is not None:
        for at, path in there:
            if at == step:
                return storage.read(path)
        steps = ", ".join(str(at) for at, _ in reversed(there)) or "none"
        raise FluxrunError(f"--step {step}: no checkpoint of this step in {run.checkpoints}; there are: {steps}")
    for _, path in there:
        try:
            return storage.read(path)
        except BadFileError as error:
            event_log.line(f"{error}; taking the checkpoint before it")
    ask = fluxrun_command("status", runs=run.runs)
    raise FluxrunError(f"{run.checkpoints}: no checkpoint to export; `{ask}` tells how far the run is")
