"""Which checkpoint a run goes on from, which it exports, and which are taken away."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runner.checkpoint import storage
from runner.checkpoint.storage import Checkpoint, Weights
from runner.checkpoint.writer import Writer
from runner.core import files
from runner.core.errors import DiskError, LockHeldError
from runner.core.events import EventLog
from runner.plan.build import make_plan
from runner.plan.disk import SPARE
from runner.plan.phases import Plan
from runner.runs.checkpoint_files import checkpoint_name, checkpoint_steps
from runner.runs.run import Run
from runner.training.run import best_checkpoint, newest_checkpoint, skip_reason
from tests.support.house import House
from tests.support.plans import FACTS, TOKENS, spec_of


class Heard(EventLog):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def made(step: int, key: str = "key", **meters: object) -> Checkpoint:
    return Checkpoint("lora", key, step, Weights({"a": torch.full((2, 2), float(step))}), {}, {"meters": meters})


def put(run: Run, one: Checkpoint) -> Path:
    files.make_folder(run.checkpoints)
    path = run.checkpoints / checkpoint_name(one.step)
    storage.write(path, one)
    return path


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Pivotal: joint to step 4, lora to step 7."""
    return make_plan(spec_of(tmp_path, TOKENS), FACTS)


@pytest.fixture
def run(house: House) -> Run:
    return Run(house.folder / "runs", "a")


def test_a_run_goes_on_from_the_newest_checkpoint_of_its_own(run: Run, plan: Plan) -> None:
    """One of another plan is left where it is, even if it is newer; so is one behind the end of its phase."""
    joint, lora = plan.training
    heard = Heard()
    assert newest_checkpoint(run, plan, heard) is None
    put(run, made(2, joint.key))
    put(run, made(5, joint.key))  # of a run whose first phase was longer
    put(run, made(6, "another plan's"))
    found = newest_checkpoint(run, plan, heard)
    assert found is not None
    assert (found.step, found.phase_key) == (2, joint.key)
    assert heard.lines == [
        "step-000006.safetensors (step 6) belongs to another plan; left alone",
        "step-000005.safetensors (step 5) belongs to another plan; left alone",
        "resuming at step 2 of 7",
    ]
    assert [step for step, _ in run.checkpoint_files()] == [6, 5, 2]
    put(run, made(6, lora.key))
    found = newest_checkpoint(run, plan, heard)
    assert found is not None
    assert found.step == 6


def test_a_damaged_one_is_set_apart_by_the_leader_alone(run: Run, plan: Plan) -> None:
    key = plan.training[0].key
    put(run, made(2, key))
    path = put(run, made(4, key))
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    found = newest_checkpoint(run, plan, Heard(), quarantine=False)
    assert found is not None
    assert (found.step, path.exists()) == (2, True)
    heard = Heard()
    found = newest_checkpoint(run, plan, heard)
    assert found is not None
    assert (found.step, path.exists()) == (2, False)
    assert [one.read_bytes() for one in run.quarantine_folder.glob("*.safetensors-1")] == [bytes(damaged)]
    assert "does not match its digest" in heard.lines[0]


def test_why_a_phase_is_skipped(plan: Plan) -> None:
    """Training by its steps, the caches once all of it is done, an export never; all of it where training ended
    early."""
    joint, lora = plan.training
    encode, export = plan.phases[0], plan.phases[-1]
    assert skip_reason(joint, plan, None) is None
    assert skip_reason(joint, plan, made(3)) is None
    assert skip_reason(joint, plan, made(4)) == "trained to step 4"
    assert skip_reason(lora, plan, made(6)) is None
    assert skip_reason(lora, plan, made(7)) == "trained to step 7"
    assert skip_reason(encode, plan, made(6)) is None
    assert skip_reason(encode, plan, made(7)) == "all training is done"
    assert skip_reason(lora, plan, made(5, ended="why")) == "training ended early: why"
    assert skip_reason(export, plan, made(7)) is None


def test_the_best_one_is_exported_and_else_the_last(run: Run) -> None:
    last = made(4, best_step=2)
    put(run, last)
    best = put(run, made(2))
    heard = Heard()
    found = best_checkpoint(run, last, heard)
    assert found is not None
    assert (found.step, heard.lines) == (2, ["export: step 2, whose eval loss is the lowest"])
    best.write_bytes(best.read_bytes()[:-1])
    assert best_checkpoint(run, last, heard) is last
    assert heard.lines[-1].endswith("; exporting step 4")
    assert best_checkpoint(run, made(4), heard).step == 4  # type: ignore[union-attr]
    assert best_checkpoint(run, None, heard) is None


def writer(folder: Path, keep: int, kept_always: set[int] = frozenset(), disk: files.Disk = files.DISK) -> Writer:  # type: ignore[assignment]
    return Writer(files.make_folder(folder), keep, kept_always, lambda: None, lambda _: None, disk)


@pytest.mark.parametrize(
    ("keep", "always", "wanted"),
    [(1, set(), [1, 5]), (2, set(), [1, 4, 5]), (1, {3}, [1, 3, 5]), (9, set(), [1, 2, 3, 4, 5])],
)
def test_the_newest_the_best_and_the_ends_of_phases_are_kept(
    tmp_path: Path, keep: int, always: set[int], wanted: list[int]
) -> None:
    """The best is step 1's."""
    own = writer(tmp_path / "checkpoints", keep, always)
    for step in range(1, 6):
        own.write(made(step, best_step=1))
    own.close()
    assert sorted(step for step, _ in checkpoint_steps(own.folder)) == wanted


def test_checkpoints_of_later_steps_are_left_alone(tmp_path: Path) -> None:
    """They are another plan's."""
    own = writer(tmp_path / "checkpoints", 1)
    for step in (8, 9):
        storage.write(own.folder / checkpoint_name(step), made(step))
    for step in (1, 2):
        own.write(made(step))
    own.close()
    assert sorted(step for step, _ in checkpoint_steps(own.folder)) == [2, 8, 9]


def test_room_for_a_checkpoint_is_its_size_and_something_to_spare(tmp_path: Path) -> None:
    size = 2 * 2 * 4

    class Disk(files.Disk):
        there = size + SPARE - 1

        def free(self, folder: Path) -> int:
            return self.there

    disk = Disk()
    own = writer(tmp_path / "checkpoints", 1, disk=disk)
    with pytest.raises(DiskError, match="no room for the checkpoint of step 1"):
        own.write(made(1))
    assert not list(own.folder.iterdir())
    disk.there += 1
    own.write(made(1))
    own.close()


@pytest.mark.parametrize("at", [0, 1], ids=["before it writes", "before it removes"])
def test_a_lost_run_gets_no_checkpoint_and_loses_none(tmp_path: Path, at: int) -> None:
    calls: list[int] = []

    def check_lease() -> None:
        calls.append(1)
        if len(calls) > 2 + at:
            raise LockHeldError("another's")

    own = Writer(files.make_folder(tmp_path / "c"), 1, (), check_lease, lambda _: None)
    own.write(made(1))
    with pytest.raises(LockHeldError):
        own.write(made(2))
    own.close()
    assert sorted(step for step, _ in checkpoint_steps(own.folder)) == ([1] if at == 0 else [1, 2])
