"""Seconds per step of the LoRA phase against a bare loop: the same transformer's forward, backward, clip and AdamW step.

    python tools/step_time.py [--rounds 8] [--steps 20] [--batch 4]

Both run in this process, on the same adapter and shapes, in turns of `--steps` steps; quoted are the medians and the
ratio turn by turn, since a shared machine's speed drifts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from runner import encode, flux, learn, train
from runner.cache import Cache
from runner.checkpoint import Weights
from runner.desk import Desk
from runner.plan import Encode
from runner.prepare import prepare
from runner.ranks import Ranks
from runner.say import Say

SPEC = """
[model]
base = "builtin:tiny"
max_sequence_length = 32
[data]
source = "{pictures}"
resolution = 64
prompt = "a thing"
center_crop = true
[lora]
rank = {rank}
layers = "attention+mlp"
[train]
steps = 100000
batch_size = {batch}
lr = 1e-4
"""


def make_desk(folder: Path, pictures: Path, batch: int, rank: int = 16) -> Desk:
    file = folder / "step.toml"
    file.write_text(SPEC.format(pictures=pictures, batch=batch, rank=rank))
    [job] = prepare([file], folder / "runs", fetch=False, fresh=False)
    assert job.pictures is not None
    base = flux.open_base("builtin:tiny", None, None, torch.device("cpu"), torch.float32)
    cache = Cache(folder / "cache")
    desk = Desk(job.spec, job.plan, job.pictures, base, cache, Say(), Ranks(), lambda: False)
    [phase] = [phase for phase in job.plan.phases if isinstance(phase, Encode)]
    encode.encode(desk, phase, Weights())
    return desk


def our_turn(
    desk: Desk, transformer: torch.nn.Module, adapter: dict[str, torch.nn.Parameter], steps: int
) -> Callable[[int], None]:
    [phase] = desk.plan.training
    encoders = learn.load_encoders(desk, phase, Weights())
    objective = learn.FlowObjective(desk, transformer, encoders)
    optimizer = learn.build_optimizer(desk.spec, learn.trainable(phase, adapter, encoders))
    factor = learn.build_schedule(desk)

    def turn(start: int) -> None:
        loop = train.Loop(start, start + steps, 10**9, 1, 1.0, 10**9, None, None)
        train.train(
            objective, optimizer, factor, loop, train.Meters(), Ranks(), torch.amp.GradScaler("cpu", enabled=False),
            save=lambda *_: None, report=lambda _: None, look=lambda _: 0.0, stop_requested=lambda: False,
        )  # fmt: skip

    return turn


def bare_turn(
    transformer: torch.nn.Module, adapter: dict[str, torch.nn.Parameter], batch: int, steps: int
) -> Callable[[int], None]:
    parameters = list(adapter.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True)
    img, txt, vec, target = (
        torch.randn(batch, 16, 64),
        torch.randn(batch, 32, 96),
        torch.randn(batch, 64),
        torch.randn(batch, 16, 64),
    )
    ids, none = flux.image_ids(8, 8, torch.device("cpu"), torch.float32), torch.zeros(32, 3)
    when, guidance = torch.full((batch,), 0.5), torch.full((batch,), 3.5)

    def turn(_: int) -> None:
        for _ in range(steps):
            out = transformer(
                hidden_states=img, timestep=when, guidance=guidance, pooled_projections=vec, encoder_hidden_states=txt,
                txt_ids=none, img_ids=ids, return_dict=False,
            )[0]  # fmt: skip
            (out - target).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pictures", type=Path, default=Path("specs/quickstart"))
    given = parser.parse_args()
    flux.quiet()
    with tempfile.TemporaryDirectory() as folder:
        desk = make_desk(Path(folder), given.pictures.resolve(), given.batch)
        transformer, adapter = learn.load_transformer(desk, desk.plan.training[0], Weights())
        turns = {
            "ours": our_turn(desk, transformer, adapter, given.steps),
            "bare": bare_turn(transformer, adapter, given.batch, given.steps),
        }
        seconds: dict[str, list[float]] = {name: [] for name in turns}
        for round_number in range(given.rounds + 1):
            for name, turn in turns.items():
                began = time.perf_counter()
                turn(round_number * given.steps)
                if round_number:  # the first is a warm-up
                    seconds[name].append((time.perf_counter() - began) / given.steps)
    ratios = [ours / bare for ours, bare in zip(seconds["ours"], seconds["bare"], strict=True)]
    print("  ".join(f"{name} {statistics.median(values) * 1000:.2f} ms/step" for name, values in seconds.items()))
    print(
        f"ratio: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}, {given.rounds} rounds"
    )


if __name__ == "__main__":
    main()
