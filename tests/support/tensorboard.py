"""TensorBoard's event files, read back with its own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def loaded(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def hparams(folder: Path) -> dict[str, Any]:
    """What the HParams plugin finds of a run, by its own parsers."""
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    tags = loaded(folder).PluginTagToContent("hparams")
    found = {tag: plugin_data_pb2.HParamsPluginData.FromString(content) for tag, content in tags.items()}
    return {
        "experiment": found[metadata.EXPERIMENT_TAG].experiment,
        "start": found[metadata.SESSION_START_INFO_TAG].session_start_info,
        "end": found[metadata.SESSION_END_INFO_TAG].session_end_info
        if metadata.SESSION_END_INFO_TAG in found
        else None,
    }


def with_events(folder: Path) -> Path:
    """Events of a trainer, as far as the board asks."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    writer.add_scalar("eval/loss", 0.5, 1)
    writer.close()
    return folder
