"""Seconds of a step against a bare loop of the same transformer forward, backward, clip and optimizer step, per phase.

    python tools/bench/step.py [--model DIR] [--rounds 8] [--steps 0] [--bases tiny model] [--phases lora clip clip+t5]
                               [--optimizers adamw prodigy]

Phases: lora, with frozen encoders; clip, the joint phase with rows learned in CLIP (the bare loop runs CLIP forward and
backward too); clip+t5, the same with both encoders. Ours is a run as a trainer process trains it, with all that it
writes down at a step (checkpoints and looks are left out, see startup.py); the bare loop (`bare.py`) imports nothing of
fluxrun. Both take turns in this process, `--steps` steps each (0: 20 on the tiny base, 4 on the model), at equal
shapes: 256 px, 128 text tokens, batch 1, rank 8 on the model; 64 px, 32, 4, 16 on the tiny base. Quoted are medians,
and the ratios turn by turn, since a shared machine's speed drifts.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from bare import Bare, Shape
from bench import SIZES, TINY, Asked, Size, Turns, machine, model_in, parser_of, pictures_in, spread, table, take_turns

PHASES: dict[str, tuple[str, ...]] = {"lora": (), "clip": ("clip",), "clip+t5": ("clip", "t5")}


def compare(base: Path, size: Size, phase: str, optimizer: str, rounds: int) -> Turns:
    """Turns of one phase on one base."""
    encoders = PHASES[phase]
    loop = Bare(base, Shape(size.resolution, size.tokens, size.batch, size.rank, optimizer, encoders))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = Asked(
            base, pictures_in(folder / "pictures"), size.resolution, size.tokens, size.batch, size.rank, optimizer,
            encoders, until=1.0, steps=10**6, prompt="a photo of TOK" if encoders else "a photo of a thing",
            save_every=10**6,
        )  # fmt: skip
        turns = take_turns(asked, folder, size.steps, rounds, loop.turn)
    if turns.trained != loop.trained:
        raise SystemExit(f"unequal: ours trains {turns.trained} numbers, the bare loop {loop.trained}")
    return turns


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--bases", nargs="+", choices=tuple(SIZES), default=tuple(SIZES))
    parser.add_argument("--phases", nargs="+", choices=tuple(PHASES), default=tuple(PHASES))
    parser.add_argument("--optimizers", nargs="+", choices=("adamw", "prodigy"), default=("adamw", "prodigy"))
    given = parser.parse_args()
    print(machine())
    rows = [
        [
            "base",
            "phase",
            "optimizer",
            "ours ms/step",
            "bare ms/step",
            "ratio (min-max)",
            "of CPU seconds",
            "rounds x steps",
        ]
    ]
    with tempfile.TemporaryDirectory() as name:
        folders = {"tiny": TINY}
        if "model" in given.bases:
            folders["model"] = model_in(given.model, Path(name))
        for base in given.bases:
            size = SIZES[base]
            if given.steps:
                size = replace(size, steps=given.steps)
            for phase in given.phases:
                for optimizer in given.optimizers:
                    turns = compare(folders[base], size, phase, optimizer, given.rounds)
                    gc.collect()
                    ours, bare = (
                        1000 * statistics.median(wall for wall, _ in side) for side in (turns.ours, turns.other)
                    )
                    rows.append([
                        base, phase, optimizer, f"{ours:.1f}", f"{bare:.1f}", spread(turns.ratios(0), 3),
                        spread(turns.ratios(1), 3), f"{given.rounds} x {size.steps}",
                    ])  # fmt: skip
                    print(" ".join(rows[-1]), flush=True)
    table(rows)


if __name__ == "__main__":
    main()
