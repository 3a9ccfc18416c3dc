"""Writes the exports of a run again, from any of its checkpoints: the work of `fluxrun export`."""

from __future__ import annotations

from pathlib import Path

from runner.checkpoint import storage
from runner.checkpoint.storage import Checkpoint
from runner.core.command_line import fluxrun_command
from runner.core.errors import BadFileError, FluxrunError
from runner.core.events import EventLog
from runner.core.signals import StopRequest
from runner.model import device, libraries
from runner.runs.index import write_index
from runner.runs.run import Run
from runner.runs.spec_file import read_spec
from runner.training.context import open_base, open_cache
from runner.training.model_pool import ModelPool
from runner.training.phases.export import ExportRequest, export_phase, push
from runner.training.recorder import export_facts


def write_exports(
    runs: Path, name: str, step: int | None, *, gpus: str | None, push_too: bool, event_log: EventLog
) -> list[Path]:
    """Write `export/` from the checkpoint of `step`, by default the newest, and return the weight files.

    The run's state (done, failed, ...) stays as it is. Raises FluxrunError if there is no such run or checkpoint, and
    LockHeldError while another process works on the run.
    """
    run = Run(runs, name)
    if not run.spec_file.is_file():
        raise FluxrunError(
            f"{run.folder}: no such run; `{fluxrun_command('status', runs=runs)}` lists the runs there are"
        )
    run.refuse_if_locked()
    with run.locked(), StopRequest() as stop:
        run.attempt = run.lease().attempt  # an export is not a new attempt: it trains nothing
        spec = read_spec(run.spec_file)
        checkpoint = _read_checkpoint(run, step, event_log)
        event_log.message(f"{name}: exporting step {checkpoint.step}")
        libraries.quiet()
        cache, target = open_cache(run.runs), device.choose_device(gpus)
        device.prepare_device(target, tf32=spec.model.tf32)
        request = ExportRequest(run, spec, open_base(spec, target, cache), event_log, stop, cache, ModelPool())
        result = export_phase(request, checkpoint)
        run.update_state(**export_facts(run, result))
        if push_too:
            push(request)
    write_index(runs)
    return [run.export / file for file in sorted(result.errors)]


def _read_checkpoint(run: Run, step: int | None, event_log: EventLog) -> Checkpoint:
    """The checkpoint of `step`, or the newest one that is intact."""
    checkpoints = run.checkpoint_files()
    if step is not None:
        for checkpoint_step, path in checkpoints:
            if checkpoint_step == step:
                return storage.read(path)
        steps = ", ".join(str(checkpoint_step) for checkpoint_step, _ in reversed(checkpoints)) or "none"
        raise FluxrunError(f"--step {step}: no checkpoint of this step in {run.checkpoints}; there are: {steps}")
    for _, path in checkpoints:
        try:
            return storage.read(path)
        except BadFileError as error:
            event_log.message(f"{error}; using the checkpoint before it")
    status = fluxrun_command("status", runs=run.runs)
    raise FluxrunError(f"{run.checkpoints}: no checkpoint to export; `{status}` shows how far the run is")
