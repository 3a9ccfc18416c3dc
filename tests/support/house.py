"""A folder with pictures, where specs are written and fluxrun is typed, in this process or in one of its own."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from click.testing import CliRunner

from runner.engine import slot_filling
from tests.support.inline_worker import InlineWorker
from tests.support.paths import PICTURES, PROJECT

slot_filling.Worker = InlineWorker  # type: ignore[attr-defined, assignment]

PIVOTAL = """
[model]
base = "builtin:tiny"
max_sequence_length = 32
[data]
source = "pictures"
resolution = 64
center_crop = true
[[tokens]]
name = "TOK"
[inversion]
encoders = ["clip", "t5"]
lr = 1e-2
[lora]
rank = 4
[train]
steps = 6
batch_size = 2
lr = 1e-3
[checkpoint]
every = 2
[validate]
prompts = ["a TOK on a white background"]
steps = 2
"""


@cache
def _keep_libraries() -> None:
    """Take the libraries' half a million objects, all there after the first command, out of the garbage collector's
    way: a run collects seven times, and each pass over them takes longer than its training here."""
    gc.freeze()


@dataclass
class Said:
    code: int
    out: str
    err: str


class House:
    """A folder with ten pictures, where specs are written and fluxrun is typed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(PICTURES, folder / "pictures")

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def spec(self, name: str = "a", /, *, drop: str = "", **changes: str) -> Path:
        """PIVOTAL with whole lines replaced: spec(steps="steps = 4"); `drop` names a table to leave out."""
        lines = PIVOTAL.strip().splitlines()
        if drop:
            start = lines.index(drop)
            stop = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("[")), len(lines))
            del lines[start:stop]
        for key, line in changes.items():
            at = [i for i, old in enumerate(lines) if old.split(" =")[0] == key]
            assert at, f"no line {key} in the spec"
            lines[at[0]] = line
        return self.write(f"{name}.toml", "\n".join(lines) + "\n")

    def fluxrun(self, *arguments: str | Path) -> Said:
        from runner.cli import main

        before = Path.cwd()
        os.chdir(self.folder)
        try:
            result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        finally:
            os.chdir(before)
            if "peft" in sys.modules:  # a command that trains; the light ones import none of them
                _keep_libraries()
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Said(result.exit_code, result.stdout, result.stderr)

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """The same in a process of its own, for signals."""
        command = [sys.executable, "-P", "-m", "runner", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
