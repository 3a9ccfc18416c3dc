"""Nothing is written into a run folder by a process that has lost the run, and no file is ever written in place."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.core import files, safetensors
from runner.core.errors import ExitCode
from runner.core.process_identity import Process
from runner.runs.run import Run
from runner.runs.state import FORMAT
from tests.support.house import House
from tests.support.inline_worker import InlineWorker
from tests.support.runs import export_bytes
from tests.support.scripted_workers import Attempt, scripted_workers

SPEC = """
[model]
base = "builtin:tiny"
max_sequence_length = 16
[data]
source = "pictures"
resolution = 64
prompt = "a thing"
[lora]
rank = 2
layers = ["attn.to_q"]
[train]
steps = 3
[checkpoint]
every = 1
keep = 1
[validate]
prompts = ["a thing"]
steps = 1
every = 2
[track]
to = []
"""
# Written in one go after a fence: nothing that takes time lies between them.
IN_ONE_GO = {("pins.json", "state.json")}
# Every line is added to these; what a lost process adds there harms nobody.
LOGS = {"run.log", "history.jsonl"}


def taken(run: Run, attempt: int = 9) -> None:
    """As another host's process takes a run whose holder it believes to be dead."""
    elsewhere = replace(Process.current(), host="elsewhere", pid=7).as_json()
    run.lease_file.write_text(json.dumps({"format": FORMAT, "attempt": attempt, "holder": elsewhere}))


def contents(run: Run) -> dict[str, bytes]:
    found = {path.relative_to(run.folder).as_posix(): path for path in run.folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in LOGS and ".partial" not in name}


class Recorded:
    """Every fence, write, removal and replacement below a run folder, in order, by the thread that did it."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.events = run, list[tuple[str, str]]()
        for owner, name, at in (
            (files, "write_bytes", 0),
            (safetensors, "write_bytes", 0),
            (files, "replace_folder", 1),
            (files.Disk, "unlink", 1),
        ):
            monkeypatch.setattr(owner, name, self._told(getattr(owner, name), at))
        real = Run.check_lease

        def check_lease(run: Run) -> None:
            self.events.append((threading.current_thread().name, ""))
            real(run)

        monkeypatch.setattr(Run, "check_lease", check_lease)

    def _told(self, real: Any, at: int) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            path = Path(arguments[at]).absolute()
            if path.is_relative_to(self.run.folder) and ".partial" not in str(path):
                self.events.append((threading.current_thread().name, path.relative_to(self.run.folder).as_posix()))
            return real(*arguments, **named)

        return call

    def by_thread(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for thread, what in self.events:
            found.setdefault(thread, []).append(what)
        return found


def test_every_write_of_a_worker_comes_right_after_a_fence(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run: class images, looks with pictures, checkpoints, retention, export. So whatever takes the run over
    between two writes is noticed before the second."""
    prior = '[prior]\nimages = "classes"\nprompt = "a thing"\ncount = 1\n'
    spec = house.write("a.toml", SPEC + prior)
    run = Run(house.folder / "runs", "a")
    recorded = Recorded(run, monkeypatch)
    begin_attempt = Run.begin_attempt
    began: list[int] = []

    def taking(self: Run, attempt: int) -> None:
        began.append(len(recorded.events))
        begin_attempt(self, attempt)

    finish = Run.release
    ended: list[int] = []

    def giving_up(self: Run) -> None:
        ended.append(len(recorded.events))
        finish(self)

    monkeypatch.setattr(Run, "begin_attempt", taking)
    monkeypatch.setattr(Run, "release", giving_up)
    assert house.fluxrun("queue", spec, "--no-check", "--gpus", "cpu").code == 0
    recorded.events = recorded.events[began[0] : ended[0]]
    written: set[str] = set()
    for events in recorded.by_thread().values():
        for before, now in zip(["", *events], events, strict=False):
            if now:
                written.add(now)
                assert before == "" or (before, now) in IN_ONE_GO, f"no fence between {before} and {now}"
    assert written >= {
        "pins.json", "state.json", "checkpoints/step-000001.safetensors", "samples/step-000002-0.png",
        "samples/step-000000-0.png", "samples/before-after.png", "export",
    }  # fmt: skip
    removed = [what for _, what in recorded.events].count("checkpoints/step-000001.safetensors")
    assert removed == 2  # written, and taken out by retention


def in_export(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.training.phases import export

    real = export._verified_pictures

    def pictures(*arguments: Any) -> Any:
        made = real(*arguments)
        taken(run)
        return made

    monkeypatch.setattr(export, "_verified_pictures", pictures)


def before_it_is_done(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.replace_folder

    def replaced(aside: Path, path: Path) -> None:
        real(aside, path)
        taken(run)

    monkeypatch.setattr(files, "replace_folder", replaced)


def during_a_look(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.training.phases import train
    from runner.training.validation import validate

    def validate_and_take(*arguments: Any) -> Any:
        result = validate(*arguments)
        taken(run)
        return result

    monkeypatch.setattr(train, "validate", validate_and_take)


def while_a_checkpoint_is_read_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that retention must not remove the one before it, which the other may be reading."""
    from runner.checkpoint import storage

    real = storage.read

    def read(path: Path) -> Any:
        found = real(path)
        if path.name == "step-000002.safetensors":
            taken(run)
        return found

    monkeypatch.setattr(storage, "read", read)


MOMENTS = [in_export, before_it_is_done, during_a_look, while_a_checkpoint_is_read_back]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_a_run_that_is_taken_over_is_left_as_it_is(
    house: House, monkeypatch: pytest.MonkeyPatch, moment: Callable[[Run, pytest.MonkeyPatch], None]
) -> None:
    """From that moment on nothing in its folder changes but the log; the queue says so and goes on to nothing else."""
    run = Run(house.folder / "runs", "a")
    seen: list[dict[str, bytes]] = []
    with monkeypatch.context() as patch:
        moment(run, patch)
        write = Path.write_text

        def remember(path: Path, *arguments: Any, **named: Any) -> int:
            done = write(path, *arguments, **named)
            if path == run.lease_file:  # by `taken`; the product writes its own otherwise
                seen.append(contents(run))
            return done

        patch.setattr(Path, "write_text", remember)
        said = house.fluxrun("queue", house.write("a.toml", SPEC), "--no-check", "--gpus", "cpu")
    assert said.code == 3
    assert said.err.endswith("a: not run: runs/a: attempt 9 has begun, this is attempt 1; nothing was written\n")
    assert seen
    after = contents(run)
    changed = {name for name in {**seen[0], **after} if seen[0].get(name) != after.get(name)}
    in_flight = {name for name in changed if name.startswith("checkpoints/")}  # its write may have begun before
    assert changed <= in_flight, changed
    assert set(seen[0]) <= set(after)


@pytest.mark.parametrize(
    "code", [ExitCode.CRASHED, ExitCode.FAILED, ExitCode.MEMORY, ExitCode.DISK, ExitCode.STOPPED, -9]
)
def test_a_queue_writes_nothing_into_a_run_that_another_has(house: House, code: int) -> None:
    """Its worker ends, however it does, after another host took the run: no state, no lease, no other attempt."""
    run = Run(house.folder / "runs", "a")
    at: list[dict[str, bytes]] = []

    def then() -> None:
        taken(run)
        at.append(contents(run))

    house.spec("a")
    with scripted_workers({"a": [Attempt(code, "why", then=then)]}) as calls:
        said = house.fluxrun("queue", "a.toml", "--no-check", "--gpus", "cpu")
    assert calls == ["a begins"]
    assert (said.code, said.err) == (
        3, f"a: not run: process 7 on elsewhere is working on {run.folder.relative_to(house.folder)}; wait for it, or stop it\n",
    )  # fmt: skip
    assert contents(run) == at[0]


def test_a_run_that_waits_and_is_taken_by_another_is_left_alone(house: House) -> None:
    """b waits while a trains; another host takes it, and a fails fast."""
    run = Run(house.folder / "runs", "b")
    at: list[dict[str, bytes]] = []

    def then() -> None:
        taken(run)
        at.append(contents(run))

    specs = [house.spec(name) for name in "ab"]
    with scripted_workers({"a": [Attempt(ExitCode.FAILED, "why", then=then)]}) as calls:
        assert house.fluxrun("queue", *specs, "--no-check", "--gpus", "cpu", "--fail-fast").code == 1
    assert calls == ["a begins"]
    assert contents(run) == at[0]


# ---- written aside and renamed -------------------------------------------------------------------------------------


def test_a_backup_by_hard_links_keeps_what_it_was(done: House, tmp_path: Path) -> None:
    """`cp -al runs backup`, then new prompts: state, plan, spec, lease, index, page, exports and pictures are all
    written again, and none of them in place."""
    house = House(tmp_path / "house")
    shutil.copytree(done.folder / "runs", house.folder / "runs")
    runs, backup = house.folder / "runs", house.folder / "backup"
    shutil.copytree(runs, backup, copy_function=os.link)
    before = {path.relative_to(backup): path.read_bytes() for path in backup.rglob("*") if path.is_file()}
    said = house.fluxrun(
        "queue", house.spec("a", prompts='prompts = ["a TOK on a hill"]'), "--gpus", "cpu", "--no-check"
    )
    assert said.code == 0, said.err
    rewritten = {
        name for name, data in before.items() if (runs / name).is_file() and (runs / name).read_bytes() != data
    }
    assert {path.as_posix() for path in rewritten} >= {
        "index.jsonl", "index.html", "a/state.json", "a/plan.json", "a/spec.toml", "a/lease.json", "a/export/README.md",
        "a/samples/before-after.png",
    }  # fmt: skip
    appended = {"a/run.log", "a/history.jsonl", "a/.lock"}
    for name, data in before.items():
        if name.as_posix() not in appended and "events.out" not in name.name and ".slots" not in name.parts:
            assert (backup / name).read_bytes() == data, name


def test_an_index_that_is_being_read_stays_whole(house: House) -> None:
    """Whoever has it open reads the old one to its end; the name is the new one's."""
    from runner.runs.index import write_index
    from tests.support.run_folders import write_run

    runs = house.folder / "runs"
    write_run(runs, "a", steps=2, pictures=False)
    write_index(runs)
    old = (runs / "index.jsonl").read_text()
    with (runs / "index.jsonl").open() as reader:
        write_run(runs, "b", steps=2, pictures=False)
        write_index(runs)
        assert reader.read() == old
        assert os.fstat(reader.fileno()).st_ino != (runs / "index.jsonl").stat().st_ino
    assert (runs / "index.jsonl").read_text().startswith(old)


# ---- done means that the exports are there -------------------------------------------------------------------------


def test_a_run_whose_export_is_gone_is_not_done(done: House, tmp_path: Path) -> None:
    """Whichever file it is: it is exported again, to the same bytes, and nothing is trained."""
    house = House(tmp_path / "house")
    shutil.copytree(done.folder / "runs", house.folder / "runs")
    spec = house.spec("a")
    run = house.folder / "runs" / "a"
    first = export_bytes(run)

    def planned() -> str:
        found: str = json.loads(house.fluxrun("plan", spec, "--json").out)["runs"][0]["state"]
        return found

    assert planned() == "done"
    for name in ("a.safetensors", "a_emb.safetensors", "README.md"):
        kept = run / "export" / name
        aside = kept.rename(house.folder / name)
        assert planned() == "resume", name
        aside.rename(kept)
    (run / "export" / "pytorch_lora_weights.safetensors").unlink()
    said = house.fluxrun("queue", spec, "--gpus", "cpu", "--no-check")
    assert said.code == 0, said.err
    assert "a: lora: skipped, trained to step 6\n" in said.err
    assert export_bytes(run) == first
    assert house.fluxrun("queue", spec).err == "a: skipped, done (same spec, data and base; its exports are there)\n"


# ---- what was planned is what is trained ---------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["a caption", "a picture", "the run's spec"])
def test_what_changes_between_plan_and_start_is_refused(
    house: House, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Nothing is trained on data that no plan knows; the same command plans again."""
    from runner.engine import slot_filling

    run = Run(house.folder / "runs", "a")

    class Late(InlineWorker):
        def submit(self, folder: Path, *more: Any) -> None:
            if what == "a caption":
                (house.folder / "pictures" / "01.txt").write_text("a TOK, quite different")
            elif what == "a picture":
                shutil.copy(house.folder / "pictures" / "02.png", house.folder / "pictures" / "01.png")
            else:
                run.spec_file.write_text(run.spec_file.read_text().replace("rank = 4", "rank = 5"))
            super().submit(folder, *more)

    monkeypatch.setattr(slot_filling, "Worker", Late)
    said = house.fluxrun("queue", house.spec("a"), "--gpus", "cpu", "--no-check")
    assert said.code == 1
    assert said.err == (
        f"a: failed: the data, the base or the spec.toml of {run.folder.relative_to(house.folder)} is not as it was when the "
        "queue planned it; the same command plans again; once that is put right, the same command goes on from the last "
        "checkpoint\n"
    )
    assert not list(run.checkpoints.glob("*"))
