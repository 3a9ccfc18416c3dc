"""TensorBoard events in the run folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from runner.train import Step


class Tracker:
    """Writes where `tensorboard --logdir runs` looks; without "tensorboard" in `track.to`, nowhere."""

    def __init__(self, folder: Path, wanted: bool, start: int) -> None:
        self.writer = None
        if wanted:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what an interrupted attempt logged after its last checkpoint
            self.writer = SummaryWriter(str(folder), purge_step=start + 1)  # type: ignore[no-untyped-call]

    def step(self, step: Step) -> None:
        if self.writer is None:
            return
        values = {"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm, "step_seconds": step.seconds}
        for name, value in values.items():
            self.writer.add_scalar(f"train/{name}", value, step.number)  # type: ignore[no-untyped-call]

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        if self.writer is not None:
            self.writer.add_image(f"samples/{name}", np.asarray(image), step, dataformats="HWC")  # type: ignore[no-untyped-call]

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()  # type: ignore[no-untyped-call]
