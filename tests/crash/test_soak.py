"""A night full of accidents: random kills and signals over a queue of four runs; the same command is typed until it is done."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import PROJECT, House
from night import assert_same, lora, unbroken
from test_processes import alive, children

LONGEST = 20.0  # seconds from the start of a command to its accident


def specs_of(house: House, steps: int) -> list[Path]:
    """A LoRA each for two optimizers, a pivotal run, a pure inversion."""
    plain = lora(house, "plain", steps=f"steps = {steps}")
    adaptive = lora(house, "adaptive", steps=f"steps = {steps}", lr='lr = 1.0\n[optimizer]\nname = "prodigy"')
    quick = {"steps": f"steps = {steps}", "prompts": "prompts = []", "encoders": 'encoders = ["clip"]'}
    return [plain, adaptive, house.spec("pivotal", **quick), house.spec("rows", **quick, rank="rank = 4\nuntil = 0")]


@pytest.mark.slow
def test_a_night_of_random_kills(house: House) -> None:
    seed, kills = int(os.environ.get("SOAK_SEED", random.randrange(10**6))), int(os.environ.get("SOAK_KILLS", 200))
    longest = float(os.environ.get("SOAK_SECONDS", 10**9))
    print(f"SOAK_SEED={seed}")
    draw, done, began = random.Random(seed), Counter[str](), time.monotonic()
    steps = max(20, kills * 6)  # so many that the night does not end before the accidents do
    specs = specs_of(house, steps)
    command = [sys.executable, "-m", "runner", "queue", *map(str, specs), "--gpus", "cpu", "--retries", "1000"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    newest: dict[str, int] = {}
    while sum(done.values()) < kills and time.monotonic() - began < longest:
        trainers: list[int] = []
        queue = subprocess.Popen(command, cwd=house.folder, env=environment, stderr=subprocess.DEVNULL)
        while queue.poll() is None and sum(done.values()) < kills and time.monotonic() - began < longest:
            time.sleep(draw.uniform(0, LONGEST))
            what = draw.choice(("queue", "queue", "trainer", "trainer", "trainer", "ask", "ask twice"))
            if queue.poll() is not None:
                break
            trainers = children(queue.pid)
            if what == "trainer" and trainers and alive(trainers[0]):
                os.kill(trainers[0], signal.SIGKILL)
            elif what == "queue":
                queue.kill()
            elif what.startswith("ask"):
                queue.terminate()
                if what == "ask twice":
                    time.sleep(draw.uniform(0, 0.3))
                    queue.terminate()
            else:
                continue
            done[what] += 1
            if what != "trainer":
                assert queue.wait(60) in (-signal.SIGKILL, -signal.SIGTERM, 3, 0)
        queue.kill()
        queue.wait()
        for trainer in trainers:
            deadline = time.monotonic() + 5
            while alive(trainer):
                assert time.monotonic() < deadline, "an orphan"
                time.sleep(0.02)
        for run in (house.folder / "runs").glob("*/checkpoints"):
            step = max((int(path.stem[5:]) for path in run.glob("step-*.safetensors")), default=0)
            assert step >= newest.get(run.parent.name, 0), f"{run}: lost a saved step"
            newest[run.parent.name] = step
        states = {row["name"]: row["state"] for row in json.loads(house.fluxrun("status", "--json").out)}
        assert set(states.values()) <= {"done", "stopped", "waiting"}, states
        if set(states.values()) == {"done"}:
            break
    print(f"{sum(done.values())} accidents in {time.monotonic() - began:.0f} s: {dict(done)}; saved steps {newest}")
    said = house.fluxrun("queue", *specs)
    assert said.code == 0, said.err
    unbroken(house, *specs)
    for spec in specs:
        assert_same(house, spec.stem)
        assert not list((house.folder / "runs" / spec.stem / "quarantine").glob("*"))
    assert not list((house.folder / "runs").rglob("*.partial"))
