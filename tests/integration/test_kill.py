"""kill -9 at ten random moments, in every phase; then the same command. The exports are byte-equal to an unbroken
run's."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest

from tests.support.house import House
from tests.support.runs import export_bytes

# (a line that says a phase has begun, the longest wait in seconds before the kill), in the order of the phases
MOMENTS = [
    ("encode: latents", 0.3),
    ("encode: latents", 0.6),
    ("joint: steps", 0.5),
    ("joint: steps", 0.6),
    ("joint: steps", 0.6),
    ("encode-learned: started", 0.3),
    ("lora: steps", 0.3),
    ("lora: steps", 0.3),
    ("export: started", 0.15),  # an export of the bundled base may take no more than 0.3 s
    ("export: reading", 0.2),
]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_ten_kills_lose_nothing(house: House, optimizer: str) -> None:
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
    print(f"KILL_SEED={seed}")
    draw = random.Random(seed)
    lr = "1.0" if optimizer == "prodigy" else "1e-3"
    spec = house.spec(steps="steps = 160", every="every = 5", lr="until = 0.5")
    spec.write_text(spec.read_text().replace("lr = 1e-3", f'lr = {lr}\n[optimizer]\nname = "{optimizer}"'))
    assert house.fluxrun("queue", spec, "--runs", "unbroken").code == 0

    killed = []
    for line_wanted, longest in MOMENTS:
        process = house.start("queue", spec)
        assert process.stderr is not None
        for line in process.stderr:
            if line_wanted in line and "skipped" not in line:
                time.sleep(draw.uniform(0, longest))
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed.append((line_wanted, process.returncode))
    assert sum(code == -signal.SIGKILL for _, code in killed) == len(MOMENTS), killed

    said = house.fluxrun("queue", spec)
    assert said.code == 0, said.err
    run = house.folder / "runs" / "a"
    assert json.loads((run / "state.json").read_text())["attempts"] >= 8  # a kill before the claim counts as none
    assert export_bytes(run) == export_bytes(house.folder / "unbroken" / "a")
    assert not list((house.folder / "runs" / "a").glob("**/*.partial"))
