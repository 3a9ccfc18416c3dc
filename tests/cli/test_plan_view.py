"""The plan on a terminal: a picture of the night."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runner.cli import plan_view
from runner.core.files import make_folder
from runner.jobs import timing
from runner.jobs.job import Job
from runner.jobs.prepare import prepare_jobs
from runner.runs.claim import claim_run
from tests.support.house import House
from tests.support.paths import PROJECT

NOW = time.mktime((2026, 7, 1, 22, 0, 0, 0, 0, -1))


def jobs_of(house: House, *specs: Path, fresh: bool = False) -> list[Job]:
    return prepare_jobs(list(specs), house.folder / "runs", fetch=False, fresh=fresh)


def begun(job: Job, **state: Any) -> None:
    """A run folder as an earlier night left it."""
    claim_run(job.run, job.spec, job.plan, "0.1.0", job.source.origin)
    job.run.release()
    facts = {**json.loads(job.run.state_file.read_text()), **state}
    job.run.state_file.write_text(json.dumps(facts))


def exported(job: Job, **state: Any) -> None:
    begun(job, state="done", step=job.plan.steps, exports=["export/x"], attempts=1, **state)
    make_folder(job.run.export)
    (job.run.export / "x").write_text("")


def checkpoint_at(job: Job, step: int) -> None:
    make_folder(job.run.checkpoints)
    header = json.dumps({"__metadata__": {"phase_key": job.plan.training[-1].key}}).encode()
    file = job.run.checkpoints / f"step-{step:06d}.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def picture(house: House, jobs: list[Job], width: int = 130) -> list[str]:
    console = Console(record=True, width=width, file=open(os.devnull, "w"))  # noqa: SIM115
    plan_view.print_plan(console, jobs, timing.estimate_times(jobs, house.folder / "runs"), {}, NOW)
    text = console.export_text().replace(f"{house.folder}/", "")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def test_a_night_of_every_state(house: House) -> None:
    specs = [house.spec(name, steps=f"steps = {steps}") for name, steps in (("a", 6), ("b", 6), ("c", 12), ("d", 3))]
    a, b, _, d = jobs_of(house, *specs)
    exported(a, s_per_step=100.0, wall_s=660.0, peak_memory_bytes=3 << 30, updated=1.0)
    begun(b, state="stopped", step=4)
    checkpoint_at(b, 4)
    begun(d, state="stopped")
    specs[3] = house.spec("d", steps="steps = 3", rank="rank = 8")
    said = picture(house, jobs_of(house, *specs, fresh=True))
    rows = {line.split()[0]: line.split() for line in said if line.split()[0] in "abcd"}
    assert rows["a"] == ["a", "░" * 12, "0"]
    assert rows["b"][:5] == ["b", "░░░░░░░░████", "2", "of", "6"]
    assert rows["b"][-5:] == ["3.0", "GiB", "100", "4:20", "22:04"]  # two steps, and the minute that was no training
    assert rows["c"][:3] == ["c", "█" * 24, "12"]
    assert rows["c"][-3:] == ["100", "21:00", "22:25"]
    assert rows["d"][:3] == ["d", "█" * 6, "3"]
    text = " ".join(" ".join(said).split())
    for words in (
        "joint 1-3, lora 4-6",
        "joint 1-6, lora 7-12",
        "done: same spec",
        "resume at step 4: interrupted",
        "new: no run",
        "changed: lora.rank: 4 -> 8",
    ):
        assert words in text
    assert said[-1].endswith("; ends 22:31, in 31:20, if started now")
    assert said[-1].startswith("4 runs, 3 to do: 17 steps, about ")


def test_times_that_nobody_knows_are_said_to_be_unknown(house: House) -> None:
    specs = [house.spec("a"), house.spec("b", resolution="resolution = 128"), house.spec("c")]
    [a, *_] = jobs_of(house, *specs)
    exported(a, s_per_step=10.0, wall_s=60.0)
    said = picture(house, jobs_of(house, *specs))
    rows = {line.split()[0]: line.split() for line in said if line.split()[0] in "abc"}
    assert rows["b"][-2:] == ["?", "?"]
    assert rows["c"][-3:] == ["10", "1:00", "?"]  # it takes a minute, but nobody knows when it begins
    assert said[-2].endswith("; when it ends is unknown")
    assert said[-1].startswith("? no earlier run on this machine has the same base and size")
    assert "(b)" in said[-1]


def test_another_batch_is_reckoned_with(house: House) -> None:
    [a] = jobs_of(house, house.spec("a"))
    exported(a, s_per_step=10.0, wall_s=60.0, peak_memory_bytes=1 << 30)
    [own] = timing.estimate_times(jobs_of(house, house.spec("b", batch_size="batch_size = 4")), house.folder / "runs")
    assert (own.s_per_step, own.seconds, own.peak, own.is_scaled) == (20.0, 120.0, None, True)
    said = picture(house, jobs_of(house, house.folder / "b.toml"))
    assert "~20" in said[2]
    assert said[-1] == "~ from an earlier run with another batch size"


def test_the_newest_run_tells_the_pace(house: House) -> None:
    for name, pace_then, updated in (("a", 10.0, 5.0), ("b", 20.0, 9.0), ("c", 30.0, 1.0)):
        [job] = jobs_of(house, house.spec(name))
        exported(job, s_per_step=pace_then, wall_s=0.0, updated=updated)
    [own] = timing.estimate_times(jobs_of(house, house.spec("d")), house.folder / "runs")
    assert own.s_per_step == 20.0


def test_what_a_sweep_comes_to(house: House) -> None:
    path = house.spec("s")
    path.write_text(path.read_text() + '[sweep]\n"lora.rank" = [4, 8]\n"lora.dropout" = [0.0, 0.1]\n')
    said = picture(house, jobs_of(house, path))
    assert "sweep of s.toml: lora.rank = 4, 8 × lora.dropout = 0.0, 0.1: 4 runs" in said
    plain = house.fluxrun("plan", path).out.splitlines()
    assert "  sweep          lora.rank = 8, lora.dropout = 0.1" in plain
    assert "s/lora.rank=8,lora.dropout=0.1  (s.toml)  new: no run folder yet" in [
        line.replace(f"{house.folder}/", "") for line in plain
    ]


def test_a_narrow_terminal_gets_less_of_it(house: House) -> None:
    [a] = jobs_of(house, house.spec("a"))
    exported(a, s_per_step=10.0, wall_s=60.0, peak_memory_bytes=1 << 30)
    said = picture(house, jobs_of(house, house.spec("b" * 60, steps="steps = 600")), width=80)
    assert said[0].split() == ["run", "phases", "steps", "takes", "ends"]
    assert said[2].split()[-3:] == ["600", "1:40:00", "23:40"]


def in_a_terminal(code: str, cwd: Path, *arguments: str) -> tuple[int, str]:
    """(exit code, what was printed) of Python code whose streams are a terminal of 130 columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "COLUMNS": "130", "TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, stdout=theirs, stderr=theirs, stdin=theirs
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the terminal is gone with its last process
            break
        if not part:
            break
        said += part
    os.close(ours)
    return process.wait(), said.decode().replace("\r\n", "\n")


PLAN = """
import sys, time
from runner.cli import main
began = time.process_time()
try:
    main(["plan", *sys.argv[1:]])
finally:
    heavy = {"torch", "diffusers", "transformers", "datasets", "huggingface_hub"} & set(sys.modules)
    print("heavy", sorted(heavy), "quick", time.process_time() - began < 1)
"""


def test_a_terminal_gets_the_picture_at_once_and_light(tmp_path: Path) -> None:
    code, said = in_a_terminal(PLAN, PROJECT, "--runs", str(tmp_path / "runs"), "specs")
    assert code == 0
    assert "joint 1-300, lora 301-1200" in " ".join(said.split())
    assert "4 runs, 4 to do: 2950 steps" in said
    assert said.splitlines()[-1] == "heavy [] quick True"


def test_a_terminal_gets_the_line_and_a_caret(house: House) -> None:
    house.spec("good")
    house.spec("bad", rank="rnk = 4")
    code, said = in_a_terminal("from runner.cli import main; main()", house.folder, "plan", "bad.toml", "good.toml")
    assert code == 2
    assert "good" in said.split("bad.toml:14")[0]  # what can be planned is shown before the faults
    assert said.splitlines()[-4:] == [
        "bad.toml:14: lora.rnk: unknown key, got rnk = 4; allowed here: alpha, dropout, layers, rank, until; did you mean lora.rank?",
        "   14 | rnk = 4",
        "      | ^^^",
        "1 fault; nothing was started",
    ]


@pytest.mark.parametrize("words", ["status x", "sample x"])
def test_the_shell_completes_runs(house: House, words: str) -> None:
    for name in ("xa", "xb", "other"):
        [job] = jobs_of(house, house.spec(name))
        begun(job)
    environment = {
        **os.environ, "PYTHONPATH": str(PROJECT), "_FLUXRUN_COMPLETE": "bash_complete", "COMP_WORDS": f"fluxrun {words}",
        "COMP_CWORD": "2",
    }  # fmt: skip
    command = [sys.executable, "-c", "from runner.cli import main; main(prog_name='fluxrun')"]
    done = subprocess.run(command, cwd=house.folder, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["plain,xa", "plain,xb"]
    elsewhere = {**environment, "FLUXRUN_RUNS": "nowhere"}
    done = subprocess.run(command, cwd=house.folder, env=elsewhere, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
