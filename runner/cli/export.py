"""`fluxrun export`: a run's exports made again, from any checkpoint, whatever state the run is in."""

from __future__ import annotations

from pathlib import Path

from runner.checkpoint import storage
from runner.checkpoint.storage import Checkpoint
from runner.core.command_line import command
from runner.core.errors import BadFile, FluxrunError
from runner.core.events import Say
from runner.core.signals import StopRequest
from runner.model.flux1 import loading
from runner.runs.index import write_index
from runner.runs.run import Run, read_spec
from runner.training.context import open_base_of, open_cache
from runner.training.model_pool import Shelf
from runner.training.phases.export import Order, deliver, push
from runner.training.recorder import export_facts


def export_run(runs: Path, name: str, step: int | None, *, gpus: str | None, push_too: bool, say: Say) -> list[Path]:
    """Write `export/` from the newest checkpoint, or that of `step`, and return its weight files. The run's state stays
    what it is. Raises FluxrunError where there is no such checkpoint, Held while another process works on the run."""
    run = Run(runs, name)
    if not run.spec_file.is_file():
        raise FluxrunError(f"{run.folder}: no such run; `{command('status', runs=runs)}` names those there are")
    run.refuse_if_held()
    with run.locked(), StopRequest() as stop:
        run.attempt = run.lease().attempt  # no attempt of its own: it trains nothing
        spec = read_spec(run.spec_file)
        made = _checkpoint(run, step, say)
        say.line(f"{name}: exporting step {made.step}")
        loading.quiet()
        cache = open_cache(run.runs)
        order = Order(run, spec, open_base_of(spec, gpus, cache), say, stop, cache, Shelf())
        delivered = deliver(order, made)
        run.amend(**export_facts(run, delivered))
        if push_too:
            push(order)
    write_index(runs)
    return [run.export / file for file in sorted(delivered.errors)]


def _checkpoint(run: Run, step: int | None, say: Say) -> Checkpoint:
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
        except BadFile as error:
            say.line(f"{error}; taking the checkpoint before it")
    ask = command("status", runs=run.runs)
    raise FluxrunError(f"{run.checkpoints}: no checkpoint to export; `{ask}` tells how far the run is")
