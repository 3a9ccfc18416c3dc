"""How many bytes a night leaves on the disk, by formula: one for `plan`, `check` and the queue. No torch.

tests/plan/test_disk.py holds it against what a run leaves: never below, and at most twice as much.
"""

from __future__ import annotations

from pathlib import Path

from runner.spec.dtypes import BYTES
from runner.spec.schema import Spec

SPARE = 16 << 20  # bytes left free beside a checkpoint, for state, log and events
SMALL_FILES = 128 << 10  # spec, plan, state, card, the curve as a picture, TensorBoard's own
BYTES_PER_STEP = 1 << 10  # in the history, TensorBoard's events and the log

# NAME.safetensors has q, k and v (and the MLP's input) of a block in one adapter, block-diagonal: in a single block with
# attention alone that is 7d x 3r + 3r x d numbers for 3 (d x r + r x d), four times as many. No layer comes to more.
FUSED = 4


def run_bytes(spec: Spec, trained: int, moments: float, stages: int, steps: int) -> int:
    """What a run's folder holds at most: checkpoints, one more while it is written, exports, pictures, logs. trained: how many
    numbers; moments: how many the optimizer keeps for each, in fp32's size; stages: of training, whose ends are kept."""
    kept = spec.checkpoint.keep + stages + 1
    kept += int(spec.export.best or spec.stop.no_better_for is not None)  # the best step's
    checkpoints = kept * int(4 * trained * (1 + moments))
    exports = BYTES[spec.export.dtype] * trained * (1 + FUSED)
    return checkpoints + exports + _picture_bytes(spec, steps) + SMALL_FILES + BYTES_PER_STEP * steps


def _picture_bytes(spec: Spec, steps: int) -> int:
    """Of PNG files that save nothing. Each look's pictures are in TensorBoard's events, too; the last ones also in the sheet of
    before and after (twice) and in the export."""
    own = spec.validation
    looks = steps // own.every if own.every else 0
    side = own.size or 512
    return len(own.prompts) * own.count * (2 * looks + 6) * 3 * side * side


def bytes_in(folder: Path) -> int:
    """Of the files below a folder; those that go meanwhile are not counted."""
    total = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def left_to_write(folder: Path, wanted: int) -> int:
    """Bytes that a run will add to its folder. wanted: `run_bytes`."""
    return max(0, wanted - bytes_in(folder))
