"""What a checkpoint costs the training: written behind its back, and written while it waits, in units of a step.

    python tools/save_stall.py [--rounds 8] [--every 10] [--batch 4] [--rank 16]

Turns of `--every` times three steps with a save after the first and the second third: none of them, both in the
background, both in the foreground, follow each other in one process; quoted are medians over the rounds of each round's
own difference to its turn without saves.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from step_time import make_desk

from runner import checkpoint, flux, learn, train
from runner.checkpoint import Checkpoint, Weights
from runner.ranks import Ranks
from runner.train import Meters
from runner.writer import Writer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA; the checkpoint grows with it")
    parser.add_argument("--pictures", type=Path, default=Path("specs/quickstart"))
    given = parser.parse_args()
    flux.quiet()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        desk = make_desk(folder, given.pictures.resolve(), given.batch, given.rank)
        [phase] = desk.plan.training
        transformer, adapter = learn.load_transformer(desk, phase, Weights())
        encoders = learn.load_encoders(desk, phase, Weights())
        objective = learn.FlowObjective(desk, transformer, encoders)
        optimizer = learn.build_optimizer(desk.spec, learn.trainable(phase, adapter, encoders))
        saves = folder / "checkpoints"
        saves.mkdir()
        writer = Writer(saves, 2, (), lambda: None, lambda _: None)

        def made(step: int) -> Checkpoint:
            tensors, numbers = optimizer.state()
            scalars = {"optimizer": numbers, "meters": vars(Meters())}
            weights = learn.weights_now(Weights(), adapter, encoders)
            return checkpoint.copied(Checkpoint(phase.name, phase.key, step, weights, tensors, scalars))

        kinds: dict[str, Callable[[int], None]] = {
            "none": lambda _: None,
            "background": lambda step: writer.save(made(step)),
            "foreground": lambda step: writer.write(made(step)),
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        start = 0
        for _ in range(given.rounds + 1):
            for kind, save in kinds.items():
                stop = start + 3 * given.every
                loop = train.Loop(start, stop, 10**9, 1, 1.0, given.every, None, None)

                def between(step: int, _: Meters, save: Callable[[int], None] = save, stop: int = stop) -> None:
                    if step < stop:
                        save(step)

                began = time.perf_counter()
                train.train(
                    objective, optimizer, learn.build_schedule(desk), loop, Meters(), Ranks(),
                    torch.amp.GradScaler("cpu", enabled=False), save=between,
                    report=lambda _: writer.look(), look=lambda _: 0.0, stop_requested=lambda: False,
                )  # fmt: skip
                seconds[kind].append(time.perf_counter() - began)
                writer.wait()
                start = stop
        size = max(path.stat().st_size for path in saves.iterdir())
    plain = seconds["none"][1:]
    step = statistics.median(plain) / (3 * given.every)
    print(f"step {step * 1000:.1f} ms, checkpoint {size / 2**20:.2f} MiB, one every {given.every} steps")
    for kind in ("background", "foreground"):
        stalls = [(own - bare) / step / 2 for own, bare in zip(seconds[kind][1:], plain, strict=True)]
        print(
            f"{kind}: median {statistics.median(stalls):+.3f} steps a save (from {min(stalls):+.3f} to {max(stalls):+.3f}),"
            f" {100 * statistics.median(stalls) / given.every:+.2f} % of a step on average"
        )


if __name__ == "__main__":
    main()
