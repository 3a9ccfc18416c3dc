"""Where a run logs numbers and pictures while it trains: TensorBoard event files in the run folder, and Weights &
Biases."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from runner.core.errors import FluxrunError
from runner.tracking.hparams import EVENT_FILE


class Tracker(Protocol):
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers by name."""

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Log an RGB picture."""

    def close(self) -> None:
        """Write what is still buffered."""


def trackers(folder: Path, name: str, wanted: Sequence[str], start: int, settings: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of a run. wanted: names as in track.to; start: the step that training continues after; settings: the
    spec by dotted key, for W&B. Raises FluxrunError if wandb is wanted and not installed."""
    opened: list[Tracker] = []
    if "tensorboard" in wanted:
        opened.append(TensorBoard(folder, start))
    if "wandb" in wanted:
        opened.append(Wandb(folder, name, start, settings))
    return opened


class TensorBoard:
    """Event files in the run folder, where `tensorboard --logdir runs` finds them."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _put_earlier_files_first(folder)
        # purge_step hides what an interrupted attempt logged after its last checkpoint
        self.writer = SummaryWriter(str(folder), purge_step=start + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def _put_earlier_files_first(folder: Path) -> None:
    """Rename earlier event files so that they sort before one created now.

    TensorBoard reads a folder's files in the order of their names, which hold the time of creation. If the clock was
    set back since, the times of earlier files are replaced by 0, 1, 2, ...
    """
    earlier = sorted(path for path in folder.glob("events.out.tfevents.*") if path.name != EVENT_FILE)
    if earlier and earlier[-1].name.split(".")[3] >= f"{int(time.time()):010d}":
        for number, path in enumerate(earlier):
            _, _, _, _, *rest = path.name.split(".")
            path.rename(path.with_name(".".join(["events.out.tfevents", f"{number:010d}", *rest])))


class Wandb:
    """One W&B run per run folder, continued by its name. wandb's own settings give project and login (WANDB_PROJECT,
    ...)."""

    def __init__(self, folder: Path, name: str, start: int, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise FluxrunError('track.to has "wandb", which is not installed; pip install "fluxrun[wandb]"') from error
        self.wandb = wandb
        self.newest = start
        config = {
            key: value for key, value in settings.items() if not key.startswith(("data.source", "model.base", "notify"))
        }
        self.run = wandb.init(
            dir=str(folder), name=name, id=f"fluxrun-{name}".replace("/", "-"), resume="allow", config=config,
            settings=wandb.Settings(silent=True),
        )  # fmt: skip

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.newest = max(self.newest, step)
        self.run.log(dict(values), step=self.newest)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Log a picture at the newest step, with its own step as caption: W&B drops what is logged for an earlier step,
        and the pictures of `export.best` may be of one."""
        self.newest = max(self.newest, step)
        self.run.log({name: self.wandb.Image(image, caption=f"step {step}")}, step=self.newest)

    def close(self) -> None:
        self.run.finish()
