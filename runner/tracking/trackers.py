"""Where numbers and pictures of a run go while it trains: TensorBoard events in the run folder, Weights & Biases."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from runner.core.errors import FluxrunError
from runner.tracking.hparams import FILE


class Tracker(Protocol):
    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, name: str, image: Image.Image, step: int) -> None: ...

    def close(self) -> None: ...


def trackers(folder: Path, name: str, wanted: Sequence[str], start: int, settings: Mapping[str, Any]) -> list[Tracker]:
    """`start`: the step the run goes on from. Raises FluxrunError where a tracker is not installed."""
    made: list[Tracker] = []
    if "tensorboard" in wanted:
        made.append(TensorBoard(folder, start))
    if "wandb" in wanted:
        made.append(Wandb(folder, name, start, settings))
    return made


class TensorBoard:
    """Where `tensorboard --logdir runs` looks."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _make_way(folder)
        # purge_step hides what an interrupted attempt logged after its last checkpoint
        self.writer = SummaryWriter(str(folder), purge_step=start + 1)  # type: ignore[no-untyped-call]

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.writer.close()  # type: ignore[no-untyped-call]


def _make_way(folder: Path) -> None:
    """TensorBoard reads a folder's files in the order of their names, which hold the time they were begun. Where the clock
    does not say that this attempt is the last one, the earlier ones' files are given the numbers of their order instead.
    """
    there = sorted(path for path in folder.glob("events.out.tfevents.*") if path.name != FILE)
    if there and there[-1].name.split(".")[3] >= f"{int(time.time()):010d}":
        for number, path in enumerate(there):
            _, _, _, _, *rest = path.name.split(".")
            path.rename(path.with_name(".".join(["events.out.tfevents", f"{number:010d}", *rest])))


class Wandb:
    """One W&B run per run folder, found again by its name; project and login are wandb's own (WANDB_PROJECT, ...)."""

    def __init__(self, folder: Path, name: str, start: int, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise FluxrunError('track.to has "wandb", which is not installed; pip install "fluxrun[wandb]"') from error
        self.wandb = wandb
        self.newest = start
        shown = {
            key: value for key, value in settings.items() if not key.startswith(("data.source", "model.base", "notify"))
        }
        self.run = wandb.init(
            dir=str(folder), name=name, id=f"fluxrun-{name}".replace("/", "-"), resume="allow", config=shown,
            settings=wandb.Settings(silent=True),
        )  # fmt: skip

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.newest = max(self.newest, step)
        self.run.log(dict(values), step=self.newest)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """With its own step as caption: W&B drops what is logged behind the newest step, where `export.best` may lie."""
        self.newest = max(self.newest, step)
        self.run.log({name: self.wandb.Image(image, caption=f"step {step}")}, step=self.newest)

    def close(self) -> None:
        self.run.finish()
