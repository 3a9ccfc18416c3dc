"""Run folders as a night leaves them, written without training: states, specs, curves, pictures, logs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import tomli_w
from PIL import Image

PROMPTS = ["a TOK on snow", "a TOK & a <cup>"]


def write_run(
    runs: Path, name: str, *, state: str = "done", rank: int = 8, lr: float = 1e-3, steps: int = 100, loss: float = 0.5,
    error: str | None = None, prompts: list[str] = PROMPTS, pictures: bool = True, look_every: int = 25, side: int = 32,
    **more: Any,
) -> Path:  # fmt: skip
    """One run with `steps` steps of history; its eval loss ends at `loss`."""
    folder = runs / name
    (folder / "samples").mkdir(parents=True)
    spec = {
        "name": name,
        "seed": 3,
        "model": {"base": "builtin:tiny"},
        "data": {"source": "pictures", "resolution": 64, "holdout": 2},
        "lora": {"rank": rank, "alpha": float(rank)},
        "train": {"steps": steps, "lr": lr},
        "validate": {"prompts": prompts, "count": 1, "every": look_every},
        "tokens": [{"name": "TOK", "vectors": 2}],
        "fluxrun": {"version": "0"},
    }
    (folder / "spec.toml").write_text(tomli_w.dumps(spec))
    (folder / "plan.json").write_text(json.dumps({"steps": steps}))
    draw = random.Random(name)
    lines = []
    for step in range(1, steps + 1):
        value = loss + 0.5 * math.exp(-4 * step / steps)
        line = {"step": step, "train/loss": round(value + draw.gauss(0, 0.1), 5), "train/lr": lr}
        if step <= steps // 2 and step % 10 == 0:
            line |= {"rows/norm TOK clip": 0.2 + step / 1000, "rows/drift TOK clip": step / 100}
        lines.append(line)
        if step % look_every == 0:
            by_sigma = {f"eval/sigma 0.{k}": round(value * (0.5 + k / 10), 5) for k in range(1, 10)}
            lines.append({"step": step, "eval/loss": round(value, 5), **by_sigma})
            for number in range(len(prompts) if pictures else 0):
                shade = (40 * number + 30, 255 * step // steps, min(255, 30 * rank % 256))
                Image.new("RGB", (side, side), shade).save(folder / "samples" / f"step-{step:06d}-{number}.png")
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.log").write_text("2025-11-01 02:00:00 joint: started\n" + (f"{error}\n" if error else ""))
    exports = []
    if state == "done":
        (folder / "export").mkdir()
        (folder / "export" / "lora.safetensors").write_bytes(b"")
        exports = ["export/lora.safetensors"]
    facts = {
        "state": state, "name": name, "step": steps, "steps": steps, "phase": "lora", "eval_loss": loss, "error": error,
        "train_loss": loss + 0.01, "s_per_step": 1.5 + rank / 100, "wall_s": 3600.0 + rank, "attempts": 1,
        "peak_memory_bytes": 20 << 30, "started": 1.76e9, "finished": 1.76e9 + 3700, "exports": exports,
        "versions": {"torch": "2"}, "base": "builtin:tiny", **more,
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))
    return folder
