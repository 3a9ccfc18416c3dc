"""What a run may be called: no folder is one of fluxrun's own, and none lies inside another run's."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from runner.engine import slot_filling
from runner.runs.run import Run
from runner.spec import run_names
from tests.support.house import House
from tests.support.inline_worker import InlineWorker
from tests.support.runs import export_bytes

LORA = """
[model]
base = "builtin:tiny"
max_sequence_length = 32
[data]
source = "pictures"
resolution = 64
center_crop = true
[lora]
rank = 4
[train]
steps = 4
[checkpoint]
every = 2
"""
TAKEN = "set another `name` in this spec (letters, digits and . _ = , + -)\n1 fault; nothing was started\n"


def named(house: House, file: str, name: str | None = None) -> Path:
    path = house.spec(file)
    if name is not None:
        path.write_text(f"name = {json.dumps(name)}\n{path.read_text()}")
    return path


def put(house: House, done: House, name: str) -> Path:
    """The finished run as an earlier fluxrun would have left it under this name."""
    folder = house.folder / "runs" / name
    shutil.copytree(done.folder / "runs" / "a", folder)
    spec = folder / "spec.toml"
    spec.write_text(spec.read_text().replace('name = "a"', f"name = {json.dumps(name)}", 1))
    return folder


@pytest.mark.parametrize(
    ("stem", "why"),
    [
        ("cache", "the cache of latents and text embeddings is there"),
        ("index.html", "the results page is there"),
        ("INDEX.jsonl", "the results index is there"),
        ("con", "Windows reserves 'con' for a device"),
        ("LPT1.night", "Windows reserves 'lpt1' for a device"),
        ("night.", "Windows drops a . at the end"),
    ],
)
@pytest.mark.parametrize("written", [False, True])
def test_a_reserved_name_is_refused(house: House, stem: str, why: str, written: bool) -> None:
    spec = named(house, "a" if written else stem, stem if written else None)
    said = house.fluxrun("queue", spec.name)
    assert (said.code, said.err) == (2, f"{spec.name}:1: name: expected a usable name, got {stem!r} ({why}); {TAKEN}")
    assert not (house.folder / "runs").exists()


@pytest.mark.parametrize("part", ["export", "Samples", "spec.toml", "events.out.tfevents.1"])
def test_names_of_a_runs_own_files_are_refused_after_a_slash(house: House, part: str) -> None:
    said = house.fluxrun("plan", named(house, "a", f"b/{part}").name)
    assert said.code == 2
    assert said.err.startswith(
        f"a.toml:1: name: expected a usable name, got 'b/{part}' (every run's folder has a {part.lower()!r}); "
    )


def test_every_file_of_a_run_is_a_reserved_name(done: House) -> None:
    """The list of names is held against a finished run, and against what the code calls its files."""
    run = Run(done.folder / "runs", "a")
    made = {path.name for path in run.folder.iterdir()}
    called = {path.name for path in vars(run).values() if isinstance(path, Path) and path.parent == run.folder}
    names = {name for name in made | called if not name.startswith(".")}
    assert len(names) > 10
    assert [name for name in sorted(names) if run_names.reserved(f"b/{name}") is None] == []
    here = {path.name for path in run.runs.iterdir() if path.name != "a" and not path.name.startswith(".")}
    assert here == set(run_names.IN_RUNS_FOLDER)


@pytest.mark.parametrize("name", ["a b", "a/b/c", ".hidden", "-x", "über"])
def test_invalid_names_are_refused_with_the_allowed_form(house: House, name: str) -> None:
    said = house.fluxrun("plan", named(house, "a", name).name)
    assert (said.code, said.err) == (
        2,
        "a.toml:1: name: expected the letters A-Z and a-z, digits and . _ = , + -, beginning with a letter, a digit or _, "
        f"with at most one / between, got {name!r} (name of the run's folder; default the file's stem)\n"
        "1 fault; nothing was started\n",
    )


@pytest.mark.parametrize(("stem", "name"), [("my lora", "my-lora"), ("cache", "run-cache"), ("猫", "my-lora")])
def test_new_writes_a_name_that_plan_accepts(house: House, stem: str, name: str) -> None:
    assert house.fluxrun("new", f"{stem}.toml").code == 0
    assert f'\nname = "{name}"' in (house.folder / f"{stem}.toml").read_text()
    assert ": name: " not in house.fluxrun("plan", f"{stem}.toml").err


def test_a_bad_name_hides_no_other_fault(house: House) -> None:
    spec = named(house, "a", "a b")
    spec.write_text(spec.read_text().replace("rank = 4", "rnk = 4"))
    said = house.fluxrun("plan", spec.name)
    assert [line.split(": ")[1] for line in said.err.splitlines()[:-1]] == ["name", "lora.rnk"]


def test_a_name_that_is_too_long_is_refused_with_its_length(house: House) -> None:
    said = house.fluxrun("plan", named(house, "a", "n" * 201).name)
    assert said.err.startswith("a.toml:1: name: expected at most 200 characters, got 201 (")
    assert run_names.longest_file_name("a=" * 100) <= 255
    assert house.fluxrun("plan", named(house, "a", "n" * 200).name).code == 0


def test_a_path_that_is_too_long_is_refused(house: House) -> None:
    room = 3840 - len(f"{house.folder}/")
    deep = "/".join(["d" * 250] * (room // 251) + ["d" * (room % 251)])
    name = "x" * 180
    said = house.fluxrun("plan", named(house, "a", name).name, "--runs", deep)
    assert said.code == 2
    assert "expected file paths of at most 4095 bytes, got " in said.err
    assert house.fluxrun("plan", named(house, "a").name, "--runs", deep).code == 0
    said = house.fluxrun("plan", "a.toml", "--runs", f"{deep}d")
    assert said.code == 2
    assert "a path of 3,841 bytes; at most 3,840 are allowed" in " ".join(said.err.split())


def test_a_disk_with_shorter_file_names_is_respected(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pathconf", lambda _, what: {"PC_NAME_MAX": 143}[what])
    said = house.fluxrun("plan", named(house, "a", "n" * 120).name)
    assert "expected file names of at most 143 bytes, as the disk of runs allows, got 159 bytes for 'nnn" in said.err
    assert "; set a shorter `name`" in said.err


# ---- runs beside each other ----------------------------------------------------------------------------------------


def test_no_run_of_a_batch_is_inside_another(house: House) -> None:
    named(house, "t0", "A"), named(house, "t1", "a/b"), named(house, "t2", "c"), named(house, "t3", "C")
    said = house.fluxrun("queue", "t0.toml", "t1.toml", "t2.toml", "t3.toml")
    assert (said.code, said.err) == (
        2,
        "t0.toml:1: name: expected a folder that holds no other run, got 'A' here and 'a/b' in t1.toml; change the "
        "`name` of one\n"
        "t3.toml:1: name: expected names that differ in more than case, got 'C' here and 'c' in t2.toml (some disks "
        "ignore case); change the `name` of one\n"
        "2 faults; nothing was started\n",
    )
    assert not (house.folder / "runs").exists()


def test_a_run_cannot_have_a_sweeps_folder(house: House) -> None:
    named(house, "one", "night")
    sweep = named(house, "two", "night")
    sweep.write_text(sweep.read_text() + '[sweep]\n"lora.rank" = [2, 4]\n')
    said = house.fluxrun("plan", "one.toml", "two.toml")
    assert said.err == (
        "one.toml:1: name: expected a folder that holds no other run, got 'night' here and 'night/lora.rank=2' in "
        "two.toml; change the `name` of one\n1 fault; nothing was started\n"
    )


def test_two_sweeps_of_one_name_are_one_fault(house: House) -> None:
    for folder in ("x", "y"):
        (house.folder / folder).mkdir()
        sweep = house.spec(f"{folder}/s", source='source = "../pictures"')
        sweep.write_text(sweep.read_text() + '[sweep]\n"lora.rank" = [2, 4]\n')
    said = house.fluxrun("plan", "x", "y")
    assert said.err == (
        "y/s.toml:1: name: expected a different name for each sweep, got 's' here and in x/s.toml; change the `name` of one\n"
        "1 fault; nothing was started\n"
    )


def test_no_run_goes_inside_an_existing_run(house: House, done: House) -> None:
    put(house, done, "a")
    said = house.fluxrun("queue", named(house, "t1", "a/b").name)
    assert said.err == (
        "t1.toml:1: name: expected a folder outside that of the run 'a', got 'a/b'; set another `name` in this spec "
        "(letters, digits and . _ = , + -)\n1 fault; nothing was started\n"
    )
    sweep = named(house, "a")
    sweep.write_text(sweep.read_text() + '[sweep]\n"lora.rank" = [2, 4, 8]\n')
    said = house.fluxrun("queue", "a.toml")
    assert said.err == (
        "a.toml:1: name: expected a folder outside that of the run 'a', got 'a/...'; set another `name` in this spec "
        "(letters, digits and . _ = , + -)\n1 fault; nothing was started\n"
    )
    said = house.fluxrun("plan", named(house, "t2", "A").name)
    assert said.err.startswith(
        "t2.toml:1: name: expected a name that differs from 'a' in more than case, got 'A' (some disks ignore case); set "
    )
    said = house.fluxrun("plan", named(house, "t2", "b").name, "--runs", "runs/a")
    assert "name: the runs folder runs/a is inside the folder of a run, " in said.err


def test_no_run_goes_around_existing_runs(house: House, done: House) -> None:
    put(house, done, "a/b")
    said = house.fluxrun("queue", named(house, "t1", "a").name)
    assert said.err == (
        "t1.toml:1: name: expected a folder that holds no other run, got 'a', which holds 'a/b'; set another `name` in this "
        'spec (letters, digits and . _ = , + -), or move that run (mv runs/a/b runs/a-b) and set name = "a-b" in its spec\n'
        "1 fault; nothing was started\n"
    )


def test_a_file_in_the_place_of_a_runs_folder_is_refused(house: House) -> None:
    (house.folder / "runs").mkdir()
    (house.folder / "runs" / "notes").write_text("mine")
    said = house.fluxrun("queue", named(house, "a", "notes").name)
    assert "name: expected no file where the run's folder will be, got runs/notes; set another" in said.err
    assert (house.folder / "runs" / "notes").read_text() == "mine"


# ---- runs that earlier versions made -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cache", "b/export"])
def test_an_old_run_with_a_reserved_name_is_kept(house: House, done: House, name: str) -> None:
    """The refusal says how; followed, the run is found again with all it has learned."""
    spec = house.spec("x")
    spec.write_text(f'name = "{name}"\n{spec.read_text()}')
    before = export_bytes(put(house, done, name))
    said = house.fluxrun("queue", "x.toml")
    other = {"cache": "run-cache", "b/export": "b-export"}[name]
    assert said.code == 2
    assert f'; move that run (mv runs/{name} runs/{other}) and set name = "{other}" in its spec' in said.err
    assert export_bytes(house.folder / "runs" / name) == before
    (house.folder / "runs" / name).rename(house.folder / "runs" / other)
    spec.write_text(spec.read_text().replace(f'"{name}"', f'"{other}"'))
    plan = house.fluxrun("plan", "x.toml")
    assert f"{other}  (x.toml)  resume: what is exported or shown changed; the training is kept" in plan.out


@pytest.mark.parametrize("name", ["con", "night."])
def test_an_old_run_with_a_name_that_windows_refuses_goes_on(house: House, done: House, name: str) -> None:
    put(house, done, name)
    spec = house.spec("x")
    spec.write_text(f'name = "{name}"\n{spec.read_text()}')
    assert f"{name}  (x.toml)  resume: " in house.fluxrun("plan", "x.toml").out


def test_pruning_the_cache_removes_only_its_own_entries(house: House, done: House) -> None:
    """Of a run that an earlier fluxrun put into its folder nothing goes."""
    shutil.copytree(done.folder / "runs" / "cache", house.folder / "runs" / "cache")
    entries = len([path for end in ("safetensors", "json") for path in (house.folder / "runs").rglob(f"*.{end}")])
    for name in ("cache", "cache/x"):
        target = house.folder / "runs" / name
        shutil.copytree(done.folder / "runs" / "a", target, dirs_exist_ok=True)
        (target / "checkpoints" / ".step-000002.safetensors.7.partial").write_text("half")
    for path in (house.folder / "runs").rglob("*"):
        os.utime(path, (0, 0))
    before = {name: export_bytes(house.folder / "runs" / name) for name in ("cache", "cache/x")}
    steps = sorted((house.folder / "runs").rglob("step-*.safetensors"))
    said = house.fluxrun("cache", "--runs", "runs", "prune", "--days", "1")
    assert said.code == 0
    assert int(said.out.split()[0]) == entries > 0
    assert {name: export_bytes(house.folder / "runs" / name) for name in before} == before
    assert sorted((house.folder / "runs").rglob("step-*.safetensors")) == steps
    assert len(list((house.folder / "runs").rglob("*.partial"))) == 2


# ---- a runs folder that vanishes -----------------------------------------------------------------------------------


def test_a_runs_folder_that_vanishes_ends_the_queue_in_one_line(house: House) -> None:
    for name in ("a", "b"):
        house.write(f"{name}.toml", LORA.replace("steps = 4", "steps = 4000"))
    queue = house.start("queue", "a.toml", "b.toml", "--gpus", "cpu", "--no-check")
    log, deadline = house.folder / "runs" / "a" / "run.log", time.monotonic() + 60
    while not (log.is_file() and "steps 1 to" in log.read_text()):
        assert time.monotonic() < deadline
        assert queue.poll() is None, queue.communicate()
        time.sleep(0.05)
    (house.folder / "runs").rename(house.folder / "elsewhere")
    _, err = queue.communicate(timeout=60)
    assert queue.returncode == 3
    assert err.splitlines()[-1] == (
        "stopped: the runs folder runs is gone: it was removed or renamed, or its disk was taken away; nothing more was "
        "written there; put it back and the same command goes on, or else begins anew"
    )
    assert "Traceback" not in err
    assert err.count(" gone") == 1
    assert not (house.folder / "runs").exists()
    (house.folder / "elsewhere").rename(house.folder / "runs")
    assert "b  (b.toml)  resume: " in house.fluxrun("plan", "a.toml", "b.toml").out


@pytest.mark.parametrize("phase", ["step", "encode"])
def test_a_run_whose_folder_vanishes_pauses_and_the_next_goes_on(
    house: House, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    from runner.training import recorder
    from runner.training.loop import Step, TrainState

    house.write("a.toml", LORA), house.write("b.toml", LORA)
    begin, step = recorder.RunRecorder.phase_started, recorder.RunRecorder.on_step

    def remove(self: recorder.RunRecorder) -> None:
        if self.run.name == "a":
            shutil.rmtree(self.run.folder)

    def beginning(self: recorder.RunRecorder, *rest: object) -> None:
        begin(self, *rest)  # type: ignore[arg-type]
        if phase == "encode":
            remove(self)

    def stepping(self: recorder.RunRecorder, one: Step, state: TrainState) -> None:
        if phase == "step" and one.number == 2:
            remove(self)
        step(self, one, state)

    monkeypatch.setattr(recorder.RunRecorder, "phase_started", beginning)
    monkeypatch.setattr(recorder.RunRecorder, "on_step", stepping)
    said = house.fluxrun("queue", "a.toml", "b.toml", "--no-check")
    assert said.code == 3
    assert (
        "a: paused: runs/a is gone: it was removed or renamed, or its disk was taken away; nothing that the run made is left "
        "there; put it back and the same command goes on, or else begins anew\n"
    ) in said.err
    assert "Traceback" not in said.err
    assert not (house.folder / "runs" / "a").exists()
    assert "b: done: runs/b/export\n" in said.err


def test_a_worker_killed_with_its_folder_gone_is_not_restarted(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(InlineWorker):
        def read_events(self) -> list[Any]:
            shutil.rmtree(self.request[0])
            self.exit_code = -9
            return []

    monkeypatch.setattr(slot_filling, "Worker", Killed)
    house.write("a.toml", LORA)
    said = house.fluxrun("queue", "a.toml", "--no-check")
    assert said.code == 3
    assert [line for line in said.err.splitlines() if " gone" in line] == [
        "a: paused: runs/a is gone: it was removed or renamed, or its disk was taken away; nothing that the run made is left "
        "there; put it back and the same command goes on, or else begins anew"
    ]
    assert not (house.folder / "runs" / "a").exists()


def test_a_runs_folder_that_cannot_be_read_is_one_line(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(runs: Path) -> None:
        raise PermissionError(13, "Permission denied", str(runs))

    monkeypatch.setattr(run_names, "names_in", refused)
    said = house.fluxrun("plan", named(house, "a").name)
    assert (said.code, said.err) == (
        3, "fluxrun: runs: Permission denied; fix that, then type the same command again\n",
    )  # fmt: skip
