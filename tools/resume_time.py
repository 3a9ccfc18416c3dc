"""Seconds from typing `fluxrun queue` again to the first new step of a run that was stopped.

    python tools/resume_time.py [--rounds 3]

Real processes on the bundled base, pivotal tuning, stopped in the joint phase: the transformer and both encoders are
loaded again. Beside it the time that the libraries take to be imported, which is most of it here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runner.rundir import Run
from runner.series import read_history

PICTURES = Path(__file__).resolve().parent.parent / "specs" / "quickstart"
SPEC = """
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
[train]
steps = 1000000
batch_size = 4
lr = 1e-3
"""


def newest(run: Run) -> int:
    return max(read_history(run.history_file).get("train/loss", {0: 0.0}))


def until_a_new_step(folder: Path) -> float:
    """Type the command, wait for a step more than there was, stop it. Seconds of the waiting."""
    run = Run(folder / "runs", "a")
    before, began = newest(run), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "runner", "queue", "a.toml", "--gpus", "cpu"], cwd=folder, stderr=subprocess.DEVNULL
    )
    while newest(run) <= before:
        if process.poll() is not None:
            raise SystemExit(f"the queue ended with code {process.returncode}")
        time.sleep(0.01)
    took = time.perf_counter() - began
    process.terminate()
    process.wait()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(PICTURES, folder / "pictures")
        (folder / "a.toml").write_text(SPEC)
        print(f"first start, with everything to encode: {until_a_new_step(folder):.1f} s")
        again = [until_a_new_step(folder) for _ in range(given.rounds)]
    code = "from runner import device; import runner.engine.trainer; device.settle_libraries()"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    print(f"again, to the first new step: median {statistics.median(again):.1f} s of {given.rounds}")
    print(f"importing the libraries alone: {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
