"""How far training came, in one file: weights, optimizer state, and a header that says whose it is."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from runner.core import files
from runner.core.errors import BadFileError
from runner.model import tensors
from runner.model.device import copy_out
from runner.runs.checkpoint_files import checkpoint_name

FORMAT = 1
NOT_THE_FILES = {
    errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR,
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """What training makes. lora, text_lora: by their modules' names in the transformer and the CLIP encoder; rows:
    "clip" and "t5", [vectors, width]; all fp32."""

    lora: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    text_lora: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """step: optimisation steps of the whole run. optimizer: per parameter "NAME/STATE". scalars: JSON numbers that
    are no tensors (Prodigy's d, step counts, the smoothed loss). No generator state: randomness comes from (seed, step).
    """

    phase: str
    phase_key: str
    step: int
    weights: Weights
    optimizer: Mapping[str, Tensor]
    scalars: Mapping[str, Any]


def named(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors under the names they have in the file."""
    return {
        **{f"lora/{name}": tensor for name, tensor in checkpoint.weights.lora.items()},
        **{f"rows/{name}": tensor for name, tensor in checkpoint.weights.rows.items()},
        **{f"text_lora/{name}": tensor for name, tensor in checkpoint.weights.text_lora.items()},
        **{f"optimizer/{name}": tensor for name, tensor in checkpoint.optimizer.items()},
    }


def copied(checkpoint: Checkpoint) -> Checkpoint:
    """The same in host memory of its own, so that training may go on while it is written."""
    return _built(
        checkpoint.phase, checkpoint.phase_key, checkpoint.step, copy_out(named(checkpoint)), checkpoint.scalars
    )


def write(path: Path, checkpoint: Checkpoint, *, disk: files.Disk = files.DISK) -> None:
    header = {
        "format": str(FORMAT),
        "phase": checkpoint.phase,
        "phase_key": checkpoint.phase_key,
        "step": str(checkpoint.step),
        "scalars": json.dumps(checkpoint.scalars, sort_keys=True),
    }
    tensors.save(path, named(checkpoint), header, disk=disk)


def read(path: Path) -> Checkpoint:
    """Read and verify; the name must agree with the header. Raises BadFileError, and OSError where it could not be read for a
    reason that is not the file's own: that tells nothing against it."""
    try:
        found, header = tensors.load(path)
    except BadFileError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in NOT_THE_FILES:
            raise error.__cause__ from error
        raise
    if header.get("format") != str(FORMAT):
        raise BadFileError(f"{path}: checkpoint format {header.get('format')}, this fluxrun reads {FORMAT}")
    try:
        step = int(header["step"])
        scalars = json.loads(header["scalars"])
        phase, key = header["phase"], header["phase_key"]
    except (KeyError, ValueError, RecursionError) as error:
        raise BadFileError(f"{path}: the header is incomplete ({error})") from error
    if path.name != checkpoint_name(step):
        raise BadFileError(f"{path}: the header says step {step}")
    return _built(phase, key, step, found, scalars)


def _built(phase: str, key: str, step: int, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> Checkpoint:
    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    weights = Weights(under("lora/"), under("rows/"), under("text_lora/"))
    return Checkpoint(phase, key, step, weights, under("optimizer/"), scalars)
