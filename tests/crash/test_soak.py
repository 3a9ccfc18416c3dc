"""Nights full of accidents: random kills and signals over a queue of four runs; the same command is typed until it is
done."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.broken_runs import assert_same, lora, unbroken
from tests.support.house import House
from tests.support.paths import PROJECT
from tests.support.processes import alive, children

STEPS = "steps = 60"
ACCIDENTS = ("queue", "queue", "worker", "worker", "worker", "ask", "ask twice")


def specs_of(house: House) -> list[Path]:
    """A LoRA each for two optimizers, a pivotal run, a pure inversion."""
    plain = lora(house, "plain", steps=STEPS)
    adaptive = lora(house, "adaptive", steps=STEPS, lr='lr = 1.0\n[optimizer]\nname = "prodigy"')
    quick = {"steps": STEPS, "prompts": "prompts = []", "encoders": 'encoders = ["clip"]'}
    return [plain, adaptive, house.spec("pivotal", **quick), house.spec("rows", **quick, rank="rank = 4\nuntil = 0")]


class Soak:
    """SOAK_SEED, SOAK_KILLS, SOAK_SECONDS (stop sooner), SOAK_LONGEST (from a command or an accident to the next one:
    twice what a worker needs to start, so that half of them hit the training)."""

    def __init__(self, house: House) -> None:
        self.house, self.specs = house, specs_of(house)
        self.seed = int(os.environ.get("SOAK_SEED", random.randrange(10**6)))
        self.kills = int(os.environ.get("SOAK_KILLS", 200))
        self.seconds = float(os.environ.get("SOAK_SECONDS", 10**9))
        self.longest = float(os.environ.get("SOAK_LONGEST", 10))
        self.draw, self.done = random.Random(self.seed), Counter[str]()
        self.began, self.newest = time.monotonic(), dict[str, int]()

    def over(self) -> bool:
        return sum(self.done.values()) >= self.kills or time.monotonic() - self.began > self.seconds

    def command(self) -> None:
        """Type it once, and let things happen until it has ended."""
        words = [sys.executable, "-m", "runner", "queue", *map(str, self.specs), "--gpus", "cpu", "--retries", "1000"]
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        queue = subprocess.Popen(words, cwd=self.house.folder, env=environment, stderr=subprocess.DEVNULL)
        workers: list[int] = []
        while not self.over():
            try:
                queue.wait(self.draw.uniform(0, self.longest))
                break
            except subprocess.TimeoutExpired:
                workers = children(queue.pid) or workers
            what = self.draw.choice(ACCIDENTS)
            if what == "worker":
                if not (workers and alive(workers[0])):
                    continue
                os.kill(workers[0], signal.SIGKILL)
            elif what == "queue":
                queue.kill()
            else:
                queue.terminate()
                if what == "ask twice":
                    time.sleep(self.draw.uniform(0, 0.3))
                    queue.terminate()
            self.done[what] += 1
            if what != "worker":
                queue.wait(120)
                break
        queue.kill()
        assert queue.wait() in (0, 1, 3, -signal.SIGKILL, -signal.SIGTERM)  # 1: see `look`
        for worker in workers:
            deadline = time.monotonic() + 10
            while alive(worker):
                assert time.monotonic() < deadline, "an orphan"
                time.sleep(0.02)

    def look(self) -> bool:
        """Nothing that was saved is lost, nothing has failed but what was killed three times in a row before it could
        save (the queue then gives it up, and the same command tries again). Whether all is done."""
        for folder in (self.house.folder / "runs").glob("*/checkpoints"):
            step = max((int(path.stem[5:]) for path in folder.glob("step-*.safetensors")), default=0)
            assert step >= self.newest.get(folder.parent.name, 0), f"{folder}: lost a saved step"
            self.newest[folder.parent.name] = step
        rows, deadline = self.rows(), time.monotonic() + 10
        while any(
            row["state"] in ("running", "waiting") for row in rows
        ):  # a worker that its queue had just begun is about to die
            assert time.monotonic() < deadline, "an orphan"
            rows = self.rows()
        for row in rows:
            given_up = row["state"] == "failed" and row["error"].startswith(
                "the training process was killed by SIGKILL (attempt "
            )
            assert row["state"] in ("done", "stopped") or given_up, row
        return len(rows) == len(self.specs) and {row["state"] for row in rows} == {"done"}

    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.house.fluxrun("status", "--json").out)
        return found

    def end_night(self) -> None:
        """The exports' bytes are an unbroken night's, and no debris is left."""
        for spec in self.specs:
            assert_same(self.house, spec.stem)
            assert not list((self.house.folder / "runs" / spec.stem / "quarantine").glob("*"))
        assert not list((self.house.folder / "runs").glob("*/**/*.partial"))
        shutil.rmtree(self.house.folder / "runs")
        self.newest.clear()


@pytest.mark.slow
def test_nights_of_random_accidents(house: House) -> None:
    soak = Soak(house)
    print(f"SOAK_SEED={soak.seed}")
    unbroken(house, *soak.specs)
    soak.began, nights = time.monotonic(), 0
    while not soak.over():
        soak.command()
        if soak.look():
            soak.end_night()
            nights += 1
    seconds = time.monotonic() - soak.began
    said = house.fluxrun("queue", *soak.specs)
    assert said.code == 0, said.err
    soak.end_night()
    print(f"{sum(soak.done.values())} accidents in {seconds:.0f} s and {nights + 1} nights: {dict(soak.done)}")
