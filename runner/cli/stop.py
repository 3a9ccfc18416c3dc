"""`fluxrun stop`: tells queues and trainers of a runs folder to save and stop. No torch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from runner.core import locks
from runner.core.command_line import fluxrun_command
from runner.core.errors import FluxrunError
from runner.runs.run import Run, find_runs


def stop_run(runs: Path, name: str) -> str:
    """What was done about it. Its queue goes on with the next run. Raises FluxrunError where nothing works on it."""
    run = Run(runs, name)
    holder = run.holder() if run.folder.is_dir() else None
    if holder is None:
        ask = fluxrun_command("status", runs=runs)
        raise FluxrunError(f"{run.folder}: nothing is working on it; `{ask}` tells what each run is doing")
    if not holder.is_local:
        raise FluxrunError(f"{run.folder}: process {holder.pid} on {holder.host} works on it; stop it there")
    trainer = locks.lock_holder(run.lock_file)
    if trainer is None:
        run.request_stop()
        return f"{name}: will not be begun"
    os.kill(trainer, signal.SIGTERM)
    return f"{name}: saves at its next step and stops (process {trainer})"


def stop_queues(runs: Path) -> list[str]:
    """Every queue that holds a run there, once. Raises FluxrunError where there is none."""
    holders = {holder.pid: holder for run in find_runs(runs) if (holder := run.holder()) and holder.is_local}
    if not holders:
        raise FluxrunError(f"{runs}: no queue is at work there")
    for pid in holders:
        os.kill(pid, signal.SIGTERM)
    return [f"queue of process {pid}: its runs save at their next step and stop" for pid in holders]
