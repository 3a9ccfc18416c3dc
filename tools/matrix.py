"""One short run per combination of what learns, prior preservation, optimizer and dtype, on the tiny base, in one
queue.

    python tools/matrix.py [--keep DIR]

108 runs of four steps, with fp16 of sixteen: its gradient scaler skips the first few until it has found its scale.
Schedules, weightings and poolings take turns over them. Exit code 0 only if every run is done, its weights are finite
and have moved, and its eval loss is a number.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

PICTURES = Path(__file__).resolve().parent.parent / "specs" / "quickstart"
TOKENS = '[[tokens]]\nname = "TOK"\n'
LEARNS = {
    "lora": "",
    "clip-lora": "[text_lora]\nrank = 2\nuntil = 0.5\n",
    "clip-pivotal": TOKENS,
    "t5-pivotal": TOKENS + '[inversion]\nencoders = ["clip", "t5"]\n',
    "inversion": TOKENS + '[inversion]\nencoders = ["clip", "t5"]\n[lora]\nuntil = 0\n',
    "lora-first": TOKENS + "[inversion]\nuntil = 1.0\n[lora]\nuntil = 0.5\n",
}
PRIOR = {"": "", "prior": '[prior]\nimages = "classes"\nprompt = "a red circle"\ncount = 4\n'}
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
DTYPES = ("fp32", "bf16", "fp16")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
WEIGHTINGS = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
POOLINGS = ("diffusers", "eos", "both")


def spec(number: int, learns: str, prior: str, optimizer: str, dtype: str) -> str:
    text = LEARNS[learns]
    if "[[tokens]]" in text:
        pooling = f'pooling = "{POOLINGS[number % len(POOLINGS)]}"\n'
        text = (
            text.replace("[inversion]\n", f"[inversion]\n{pooling}")
            if "[inversion]" in text
            else f"{text}[inversion]\n{pooling}"
        )
    return (
        f'[model]\nbase = "builtin:tiny"\nmax_sequence_length = 16\ndtype = "{dtype}"\n'
        f'[data]\nsource = "pictures"\nresolution = 64\ncenter_crop = true\n{text}{PRIOR[prior]}'
        f"[train]\nsteps = {16 if dtype == 'fp16' else 4}\nbatch_size = 1\nguidance = 3.5\n"
        f'[train.weighting]\nscheme = "{WEIGHTINGS[number % len(WEIGHTINGS)]}"\n'
        f'[optimizer]\nname = "{optimizer}"\n[schedule]\nname = "{SCHEDULES[number % len(SCHEDULES)]}"\n'
        "[validate]\nsteps = 1\n"
    )


def fault(run: Path, record: dict[str, Any]) -> str | None:
    """What is wrong with a run."""
    import torch

    from runner.checkpoint import storage

    if record["state"] != "done":
        return str(record["error"])
    if not math.isfinite(record["eval_loss"]):
        return f"eval loss {record['eval_loss']}"
    last = storage.read(max((run / "checkpoints").glob("*.safetensors")))
    named = {**last.weights.lora, **last.weights.rows, **last.weights.text_lora}
    if not all(torch.isfinite(tensor).all() for tensor in named.values()):
        return "weights are not finite"
    still = [name for name, tensor in last.weights.lora.items() if ".lora_B." in name and not tensor.any()]
    return f"{len(still)} adapters have not moved" if still and len(still) == len(last.weights.lora) // 2 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="work here, and leave everything")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        (folder / "specs").mkdir(parents=True, exist_ok=True)
        (folder / "specs" / "pictures").unlink(missing_ok=True)
        os.symlink(PICTURES, folder / "specs" / "pictures")
        combinations = list(itertools.product(LEARNS, PRIOR, OPTIMIZERS, DTYPES))
        for number, one in enumerate(combinations):
            name = "_".join(filter(None, one))
            (folder / "specs" / f"{name}.toml").write_text(spec(number, *one))
        began = time.monotonic()
        command = [sys.executable, "-m", "runner", "queue", "specs", "--gpus", "cpu"]
        done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
        wall = time.monotonic() - began
        records = [json.loads(line) for line in (folder / "runs" / "index.jsonl").read_text().splitlines()]
        faults = {record["name"]: fault(folder / "runs" / record["name"], record) for record in records}
        wrong = {name: why for name, why in faults.items() if why}
        states = Counter(record["state"] for record in records)
        print(f"{len(combinations)} runs in {wall:.0f} s: {dict(states)}, exit code {done.returncode}")
        for name, why in wrong.items():
            print(f"  {name}: {why}")
        sys.exit(1 if wrong or done.returncode or len(records) != len(combinations) else 0)


if __name__ == "__main__":
    main()
