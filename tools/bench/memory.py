"""Estimated against measured memory of every phase, on the benchmark model.

    python tools/bench/memory.py [--model FOLDER] [--only WORD] [--steps 4]

Each spec runs in a fresh process on the CPU, where a phase's peak is the most that the process had resident, less what
it held before any model was loaded (`memory_before_models` in state.json). The model is made by make_model.py.

glibc is told to give freed memory back at once (its mmap threshold stays at its least), else its heap keeps holes: what
a run needs is then told from what the heap wastes. `--heap` leaves glibc as the trainer has it, and shows the waste.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

EXACT = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.mmap_threshold=131072"}
PROJECT = Path(__file__).resolve().parents[2]
SPEC = """
[model]
base = "{model}"
max_sequence_length = {tokens}
gradient_checkpointing = {checkpointing}
[data]
source = "{pictures}"
resolution = {resolution}
center_crop = true
{text}
[lora]
rank = 16
layers = "{layers}"
[train]
steps = {steps}
batch_size = {batch}
lr = 1e-4
[optimizer]
name = "{optimizer}"
[validate]
prompts = ["a TOK on a table"]
steps = 2
[checkpoint]
every = 1000
[track]
to = []
"""
CLIP_ROWS = '[[tokens]]\nname = "TOK"\n[inversion]\nencoders = ["clip"]'
BOTH_ROWS = '[[tokens]]\nname = "TOK"\n[inversion]\nencoders = ["clip", "t5"]'
USUAL: dict[str, Any] = {
    "tokens": 128, "checkpointing": "false", "resolution": 256, "text": "", "layers": "attention", "batch": 1,
    "optimizer": "adamw",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "pivotal CLIP": {"text": CLIP_ROWS},
    "pivotal CLIP+T5": {"text": BOTH_ROWS},
    "pivotal CLIP+T5, selective": {"text": f'{BOTH_ROWS}\ngradient_checkpointing = "selective"'},
    "frozen, captions": {},
    "batch 2": {"batch": 2},
    "checkpointing": {"batch": 2, "checkpointing": "true"},
    "512 px": {"resolution": 512},
    "512 px, selective": {"resolution": 512, "checkpointing": '"selective"'},
    "512 px, checkpointing": {"resolution": 512, "checkpointing": "true", "text": CLIP_ROWS},
    "all layers, batch 4, Prodigy": {"batch": 4, "layers": "all", "optimizer": "prodigy"},
    "512 tokens": {"tokens": 512, "text": BOTH_ROWS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="made by make_model.py; made anew when absent")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--heap", action="store_true", help="with glibc's heap as it is")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fluxrun-memory-") as name:
        folder = Path(name)
        model = options.model or folder / "model"
        if not (model / "model_index.json").is_file():
            subprocess.run([sys.executable, PROJECT / "tools" / "bench" / "make_model.py", model], check=True)
        make_pictures(folder / "pictures")
        print(f"{'case':<32}{'phase':<16}{'estimated':>10}{'measured':>10}{'ratio':>7}   MiB above the libraries")
        outside = 0
        for case, changes in CASES.items():
            if options.only in case:
                asked = {**changes, "steps": options.steps}
                for phase, estimated, measured in measure(folder, model, case, asked, {} if options.heap else EXACT):
                    ratio = estimated / measured
                    outside += not 0.9 <= ratio <= 1.15
                    print(f"{case:<32}{phase:<16}{estimated:>10.1f}{measured:>10.1f}{ratio:>7.2f}", flush=True)
        print(f"{outside} outside 0.9 to 1.15")


def make_pictures(folder: Path) -> None:
    folder.mkdir()
    for index in range(4):
        Image.effect_noise((512, 512), 60).convert("RGB").save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a TOK on a table, number {index}")


def measure(
    folder: Path, model: Path, case: str, changes: dict[str, Any], more: dict[str, str]
) -> list[tuple[str, float, float]]:
    """(phase, estimated, measured) in MiB."""
    place = folder / case.replace(" ", "-").replace(",", "").replace("+", "-")
    place.mkdir()
    spec = place / "run.toml"
    spec.write_text(SPEC.format(**{**USUAL, **changes, "model": model.resolve(), "pictures": folder / "pictures"}))
    command = [sys.executable, "-m", "runner"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1", **more}
    told = subprocess.run(
        [*command, "plan", spec, "--json", "--gpus", "cpu"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    [planned] = json.loads(told.stdout)["runs"]
    estimates = {one["name"]: one["memory"]["total"] for one in planned["phases"]}
    done = subprocess.run(
        [*command, "queue", spec, "--gpus", "cpu", "--no-check"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{case}: {done.stdout}{done.stderr}")
    [state_file] = place.glob("runs/run/state.json")
    state = json.loads(state_file.read_text())
    before = state["memory_before_models"]
    return [
        (name, estimates[name] / 2**20, (facts["peak_memory_bytes"] - before) / 2**20)
        for name, facts in state["phases"].items()
    ]


if __name__ == "__main__":
    main()
