"""The writer's operations in a process without torch, which starts in a moment, for strace.
`tests/crash/test_kill_save.py` holds that they are the same. Arguments: the folder of the checkpoints, then "tell" to
print each operation, or "speak first" to do it wrongly."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path
from typing import Any

from runner.core import files, safetensors
from runner.runs.checkpoint_files import checkpoint_name, checkpoint_steps

STEPS, PIVOT, KEEP, LENGTH = (10, 20, 30, 40, 50), 20, 1, 300


class Telling(files.Disk):
    def __getattribute__(self, name: str) -> Any:
        if name in ("create", "write", "sync", "close", "rename", "unlink", "sync_folder"):
            print(name, flush=True)
        return super().__getattribute__(name)


def rounded(values: list[float]) -> safetensors.RawTensor:
    data = struct.pack(f"<{len(values)}f", *values)
    return safetensors.RawTensor("F32", (len(values),), memoryview(data))


def save(folder: Path, step: int, disk: files.Disk, speak_first: bool) -> None:
    values = [float(number + step) for number in range(LENGTH)]
    tensors = {
        "lora/a": rounded(values),
        "lora/b": rounded([-value for value in values]),
        "rows/clip": rounded([2 * value for value in values[:7]]),
        "optimizer/lora/a/exp_avg": rounded([value / 3 for value in values]),
    }
    header = {
        "format": "1", "phase": "joint", "phase_key": "key", "step": str(step), "scalars": json.dumps({"d": step / 7}),
    }  # fmt: skip
    if speak_first:
        print(f"checkpoint at step {step}", flush=True)
    digest = safetensors.tensors_digest(tensors, header)
    safetensors.write_tensors(folder / checkpoint_name(step), tensors, {**header, "sha256": digest}, disk=disk)
    there = [(number, path) for number, path in checkpoint_steps(folder) if number <= step and number != PIVOT]
    for _, path in there[KEEP:]:
        disk.unlink(path)
    if not speak_first:
        print(f"checkpoint at step {step}", flush=True)


def main() -> None:
    folder, how = Path(sys.argv[1]), sys.argv[2:]
    os.mkdir(folder.parent / "<")  # marks where Python's own calls end
    for step in STEPS:
        save(folder, step, Telling() if how == ["tell"] else files.DISK, how == ["speak first"])
    os.mkdir(folder.parent / ">")


main()
