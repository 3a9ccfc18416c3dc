"""What is no step: fluxrun's start, the start of a run, of the next one and of one that goes on, a checkpoint, the
export.

    python tools/bench/startup.py [--model DIR] [--rounds 3] [--steps 4] [--bases tiny model]
                                  [--parts commands queue resume checkpoint]

commands    `fluxrun --help`, `fluxrun plan`, and the import of the libraries that train, alone.
queue       a queue of two pivotal specs (CLIP and T5): from typing the command to the first step of the first run, with
            everything to encode; from the end of the first to the first step of the second, in the same warm process; from
            the last step to the end of the run (its look, its last checkpoint, the export), and the export phase alone.
resume      from typing the same command again to the first new step, stopped in the joint phase: the transformer and both
            encoders are loaded again.
checkpoint  what a save costs the training, in units of a step: in one run, ten steps with a save among them against the ten
            after; and what the same file takes to write while training waits. `--save-rank` makes the file grow.

Moments are taken from outside, from the run's history and state, every 20 ms.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench import (
    SIZES,
    TINY,
    Asked,
    machine,
    model_in,
    newest_checkpoint,
    parser_of,
    pictures_in,
    spread,
    state_of,
    steps_of,
    table,
    train_here,
    write_in_the_foreground,
)
from watch import OUR_IMPORTS, Watched, fluxrun, imports, watch

EVERY = 10  # steps of a block, with a save or without
SAVES = 4  # a round
ROWS = [["base", "what", "median s (min-max)"]]


def tell(base: str, what: str, seconds: list[float]) -> None:
    ROWS.append([base, what, spread(seconds)])
    print(" | ".join(ROWS[-1]), flush=True)


def commands(name: str, given: Asked, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        (folder / "a.toml").write_text(given.text)
        took: dict[str, list[float]] = {}
        measures: dict[str, Callable[[], Watched]] = {
            "fluxrun --help": lambda: watch(fluxrun("--help"), folder, folder / "log"),
            "fluxrun plan": lambda: watch(fluxrun("plan", "a.toml"), folder, folder / "log"),
            "the libraries' import alone": lambda: imports(folder, OUR_IMPORTS),
        }
        for _ in range(rounds):
            for what, measure in measures.items():
                took.setdefault(what, []).append(measure().wall)
    for what, seconds in took.items():
        tell(name, what, seconds)


def one_queue(given: Asked) -> dict[str, float]:
    """Moments of a queue of two, as seconds since the command was typed."""
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        for seed, spec in enumerate("ab"):
            (folder / f"{spec}.toml").write_text(replace(given, seed=seed).text)
        runs, moments, began = folder / "runs", dict[str, float](), time.perf_counter()

        def seen(_: int) -> bool:
            for spec in "ab":
                step, state = steps_of(runs / spec), state_of(runs / spec)
                for what, is_so in {
                    "first": step >= 1,
                    "last": step >= given.steps,
                    "export": state.get("phase") == "export",
                    "done": state.get("state") == "done",
                }.items():
                    if is_so:
                        moments.setdefault(f"{spec} {what}", time.perf_counter() - began)
            return False

        watch(fluxrun("queue", "a.toml", "b.toml", "--gpus", "cpu"), folder, folder / "log", then=seen)
        seen(0)
        return moments


def queue(name: str, given: Asked, rounds: int) -> None:
    all_moments = [one_queue(given) for _ in range(rounds)]
    for what, start, end in (
        ("to the first step of a queue", None, "a first"),
        ("from the end of a run to the next one's first step", "a done", "b first"),
        ("from the last step to the end of the run", "b last", "b done"),
        ("of which the export phase", "b export", "b done"),
    ):
        tell(name, what, [moments[end] - (moments[start] if start else 0.0) for moments in all_moments])


def until_a_new_step(folder: Path) -> float:
    """Type the command, wait for a step more than there was, stop it. Seconds of the waiting."""
    run = folder / "runs" / "a"
    before, began, found = steps_of(run), time.perf_counter(), list[float]()

    def seen(_: int) -> bool:
        if steps_of(run) > before:
            found.append(time.perf_counter() - began)
        return bool(found)

    watch(fluxrun("queue", "a.toml", "--gpus", "cpu"), folder, folder / "log", then=seen)
    return found[0]


def resume(name: str, given: Asked, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        (folder / "a.toml").write_text(replace(given, steps=10**6).text)
        until_a_new_step(folder)
        tell(name, "again, to the first new step", [until_a_new_step(folder) for _ in range(rounds)])


def checkpoint(name: str, given: Asked, rounds: int) -> None:
    moments: list[float] = []

    def heard(_: int) -> bool:
        moments.append(time.perf_counter())
        return len(moments) >= 2 * EVERY * (SAVES * rounds + 1)

    with tempfile.TemporaryDirectory() as where:
        asked = replace(given, encoders=(), prompt="a photo of a thing", steps=10**6, save_every=2 * EVERY)
        file = newest_checkpoint(train_here(asked, Path(where), heard))
        size, foreground = file.stat().st_size, write_in_the_foreground(file)
    blocks = [moments[at + EVERY - 1] - moments[at - 1] for at in range(2 * EVERY, len(moments) - EVERY + 1, EVERY)]
    saving, plain = blocks[::2], blocks[1::2]  # a save begins right after the moment of its step
    step = statistics.median(plain) / EVERY
    stalls = [(own - bare) / step for own, bare in zip(saving, plain, strict=False)]
    ROWS.append([
        name, f"a save of {size / 2**20:.1f} MiB, in steps of {1000 * step:.0f} ms (written while training waits: "
        f"{foreground / step:.2f})", spread(stalls),
    ])  # fmt: skip
    print(" | ".join(ROWS[-1]), flush=True)


PARTS: dict[str, Callable[[str, Asked, int], None]] = {
    "commands": commands,
    "queue": queue,
    "resume": resume,
    "checkpoint": checkpoint,
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of each run of the queue")
    parser.add_argument("--bases", nargs="+", choices=tuple(SIZES), default=tuple(SIZES))
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--save-rank", type=int, help="of the LoRA whose checkpoint is saved")
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        pictures = pictures_in(folder / "pictures")
        for name in given.bases:
            base = TINY if name == "tiny" else model_in(given.model, folder)
            size = SIZES[name]
            for part in given.parts:
                rank = given.save_rank if part == "checkpoint" and given.save_rank else size.rank
                asked = Asked(
                    base, pictures, size.resolution, size.tokens, size.batch, rank, "adamw", ("clip", "t5"),
                    steps=given.steps,
                )  # fmt: skip
                PARTS[part](name, asked, given.rounds)
    table(ROWS)


if __name__ == "__main__":
    main()
