"""How many bytes a run leaves on the disk, by formula. `plan`, `check` and the queue use the same one.

tests/plan/test_disk.py compares it with what runs leave: it is never too low, and at most twice as high.
"""

from __future__ import annotations

from pathlib import Path

from runner.spec.dtypes import BYTES
from runner.spec.schema import Spec

SPARE = 16 << 20  # bytes to leave free besides a checkpoint, for state, log and events
SMALL_FILES = 128 << 10  # spec, plan, state, card, loss curve, TensorBoard's own files
BYTES_PER_STEP = 1 << 10  # in the history, TensorBoard's events and the log

# Numbers that an optimizer keeps per trained number, in units of fp32. Prodigy: two moments, its sum and its start.
MOMENTS = {"adamw": 2.0, "adamw8bit": 0.5, "prodigy": 4.0}

# NAME.safetensors joins q, k and v (and the MLP's input) of a block into one block-diagonal adapter. In a single block
# with attention alone that is 7d x 3r + 3r x d numbers instead of 3 (d x r + r x d), four times as many. No layer needs
# more.
FUSED = 4


def run_bytes(spec: Spec, trained: int, train_phases: int, steps: int) -> int:
    """What a run folder holds at most: checkpoints (one more while it is written), exports, sample images, logs.
    trained: number of trained parameters. The last checkpoint of each training phase is kept."""
    checkpoint = int(4 * trained * (1 + MOMENTS[spec.optimizer.name]))
    kept = spec.checkpoint.keep + train_phases + 1
    kept += int(spec.export.best or spec.stop.no_better_for is not None)  # the best step's
    exports = BYTES[spec.export.dtype] * trained * (1 + FUSED)
    return kept * checkpoint + exports + _sample_bytes(spec, steps) + SMALL_FILES + BYTES_PER_STEP * steps


def _sample_bytes(spec: Spec, steps: int) -> int:
    """Of PNG files that do not compress. Those of each validation are in TensorBoard's events as well, the last ones
    also in the grid of before and after (twice) and in the export."""
    validation = spec.validation
    times = steps // validation.every if validation.every else 0
    side = validation.size or 512
    return len(validation.prompts) * validation.count * (2 * times + 6) * 3 * side * side


def bytes_in(folder: Path) -> int:
    """Of the files below a folder. Files that are removed meanwhile do not count."""
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
