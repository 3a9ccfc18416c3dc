"""Output that nobody reads: what trains goes on, what only prints ends as other programs do. In processes of their
own."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.house import House
from tests.support.paths import PROJECT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT)}


def closed_pipe() -> int:
    """The writing end of a pipe whose reader has gone, as behind `| head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def lost_terminal() -> int:
    master, slave = pty.openpty()
    os.close(master)
    return slave


def fluxrun(folder: Path, *words: str | Path, out: int, err: int) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-P", "-m", "runner", *map(str, words)]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, stdout=out, stderr=err, timeout=300, check=False)


def test_a_night_whose_output_goes_into_a_closed_pipe(house: House) -> None:
    spec = house.spec(steps="steps = 2", prompts="prompts = []")
    pipe = closed_pipe()
    done = fluxrun(house.folder, "queue", spec, "--gpus", "cpu", "--json", out=pipe, err=pipe)
    os.close(pipe)
    assert done.returncode == 0
    state = json.loads((house.folder / "runs" / "a" / "state.json").read_text())
    assert (state["state"], state["step"]) == ("done", 2)


@pytest.mark.parametrize("gone", [closed_pipe, lost_terminal])
def test_a_queue_that_has_nothing_to_do_ends_well_too(done: House, gone: object) -> None:
    output = gone()  # type: ignore[operator]
    ended = fluxrun(done.folder, "queue", "a.toml", out=output, err=output)
    assert ended.returncode == 0
    os.close(output)


def test_a_fault_keeps_its_code_where_nobody_reads_it(house: House) -> None:
    output = closed_pipe()
    assert fluxrun(house.folder, "queue", house.spec(name='name = "SKS"'), out=output, err=output).returncode == 2
    os.close(output)


@pytest.mark.parametrize("words", ["results", "results --json", "plan a.toml"])
def test_a_table_that_head_has_read_enough_of(done: House, words: str) -> None:
    """128 + SIGPIPE, as `yes | head` has it, and not a word."""
    output = closed_pipe()
    ended = fluxrun(done.folder, *words.split(), out=output, err=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (141, b"")
    os.close(output)


def test_closed_standard_files_do_not_become_files_of_the_run() -> None:
    """Else what a library prints would go into whatever is opened next."""
    code = (
        "import os, tempfile\n"
        "from runner.core import output\n"
        "with output.ignore_lost_output(), tempfile.TemporaryFile() as file:\n"
        "    os._exit(file.fileno())\n"
    )
    command = f"exec \"{sys.executable}\" -P -c '{code}' 0<&- 1>&- 2>&-"
    assert subprocess.run(command, shell=True, env=ENVIRONMENT, check=False).returncode > 2
