"""What only a GPU shows: `pytest -m gpu -n 0`. Skipped, loudly, where torch sees none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runner.cache.store import Cache
from runner.checkpoint.storage import Weights
from runner.core.events import EventLog
from runner.jobs.prepare import prepare_jobs
from runner.model import base as bases
from runner.model import device, libraries
from runner.plan.phases import Encode
from runner.runs.claim import claim_run
from runner.training.context import RunContext
from runner.training.distributed import Ranks
from runner.training.objective import FlowObjective
from runner.training.phases import train
from runner.training.phases.encode import encode_phase
from tests.support.house import House

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here: nothing of this file was tried"),
]


def context_on_gpu(spec: Path) -> RunContext:
    libraries.quiet()
    [job] = prepare_jobs([spec], spec.parent / "runs", fetch=True, fresh=False)
    where, own = device.choose_device("0"), job.spec.model
    device.prepare_device(where, tf32=own.tf32)
    base = bases.open_base(own.base, own.revision, own.variant, where, device.resolve_dtype(own.dtype, where))
    assert job.pictures is not None
    return RunContext(
        job.spec, job.plan, job.pictures, base, Cache(spec.parent / "cache"), EventLog(), Ranks(), lambda: False
    )


def exports(house: House, runs: str) -> dict[str, bytes]:
    folder = house.folder / runs / "a" / "export"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("phase_name", ["joint", "lora"])
def test_a_step_waits_for_the_device_only_where_its_numbers_are_read(house: House, phase_name: str) -> None:
    """Forward, backward, clip and optimizer step run without a single host-device synchronisation."""
    context = context_on_gpu(house.spec("a"))
    for phase in context.plan.phases:
        if isinstance(phase, Encode) and phase.at == 0:
            encode_phase(context, phase, Weights())
    [phase] = [one for one in context.plan.training if one.name == phase_name]
    transformer, adapter = train.load_transformer(context, phase, Weights())
    encoders = train.load_encoders(context, phase, Weights())
    optimizer = train.build_optimizer(context.spec, train.trainable(phase, adapter, encoders))
    objective = FlowObjective(context, transformer, encoders)
    try:
        for step in range(4):
            if step == 2:  # kernels are loaded and tables made
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            objective.loss(step, 0).backward()
            torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0)
            optimizer.step(1.0)
            objective.post_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        objective.close()


def test_memory_is_back_between_runs(house: House) -> None:
    from runner.core.errors import ExitCode
    from runner.core.signals import StopRequest
    from runner.engine.worker_main import TrainRequest, WorkerState, train_run

    house.spec("a")
    house.spec("b", rank="rank = 16")
    jobs = prepare_jobs(
        [house.folder / "a.toml", house.folder / "b.toml"], house.folder / "runs", fetch=True, fresh=False
    )
    state = WorkerState()
    left = []
    for job in jobs:
        attempt = claim_run(job.run, job.spec, job.plan, "test", job.source.origin)
        assert (
            train_run(TrainRequest(job.run.folder, attempt), "0", lambda _: None, StopRequest(), state) == ExitCode.DONE
        )
        device.release(torch.device("cuda"))
        left.append(torch.cuda.memory_allocated() - state.model_pool.bytes)
        assert not state.has_leaked("0")
    assert left[1] - left[0] < 8 << 20
    assert state.model_pool.bytes > 0


def test_two_trainings_and_a_resumed_one_end_with_the_same_bytes(house: House) -> None:
    house.spec("a")
    for runs in ("one", "two"):
        assert house.fluxrun("queue", "a.toml", "--runs", runs, "--gpus", "0").code == 0
    assert exports(house, "one") == exports(house, "two")
    for checkpoint in (house.folder / "two" / "a" / "checkpoints").iterdir():
        if "000006" in checkpoint.name:
            checkpoint.unlink()
    (house.folder / "two" / "a" / "state.json").unlink()
    assert house.fluxrun("queue", "a.toml", "--runs", "two", "--gpus", "0").code == 0
    assert exports(house, "one") == exports(house, "two")
