"""TensorBoard and Weights & Biases get the numbers."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from tests.support.house import House


def test_weights_and_biases_gets_the_numbers(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    said = house.fluxrun("queue", house.spec(every='every = 2\n[track]\nto = ["wandb"]', steps="steps = 2"))
    assert said.code == 0, said.err
    run = house.folder / "runs" / "a"
    [record] = run.glob("wandb/offline-run-*/run-fluxrun-a.wandb")
    content = record.read_bytes()
    for key in (b"train/loss", b"eval/loss", b"samples/a-TOK", b"lora.rank"):
        assert key in content
    assert not list(run.glob("events.out.*"))


def test_tensorboard_events_read_back(done: House) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(done.folder / "runs" / "a"))
    events.Reload()
    train = {"train/loss", "train/grad_norm", "train/step_seconds", "lr/lora", "lr/rows"}
    evaluation = {"eval/loss", *(f"eval/sigma 0.{k}" for k in range(1, 10))}
    rows = {f"rows/{what} TOK {encoder}" for what in ("norm", "drift") for encoder in ("clip", "t5")}
    run = {"run/train_loss", "run/s_per_step", "run/peak_memory_GiB"}
    assert set(events.Tags()["scalars"]) == train | evaluation | rows | run
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Tags()["images"] == ["samples/a-TOK-on-a-white-background/0"]


def test_wandb_gets_an_earlier_steps_pictures_where_it_takes_them() -> None:
    """W&B ignores what is logged behind the newest step."""
    from PIL import Image

    from runner.tracking.trackers import Wandb

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            logged.append((step, values))

    class Library:
        @staticmethod
        def Image(image: Image.Image, caption: str) -> str:
            return caption

    logged: list[tuple[int, dict[str, Any]]] = []
    tracker = Wandb.__new__(Wandb)
    tracker.wandb, tracker.run, tracker.newest = Library, Run(), 0  # type: ignore[assignment]
    tracker.scalars({"train/loss": 1.0}, 6)
    tracker.picture("samples/a", Image.new("RGB", (8, 8)), 2)
    assert logged == [(6, {"train/loss": 1.0}), (6, {"samples/a": "step 2"})]
