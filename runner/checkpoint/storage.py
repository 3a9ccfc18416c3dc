"""The checkpoint format: weights and optimizer state in one safetensors file, whose header names the phase and the
step."""

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
# Errors that say nothing about the file: permissions, file handles, memory, a network file system.
UNRELATED_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR,
}  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Everything that training learns, in fp32.

    lora: "MODULE.lora_A.weight" [rank, in] and "MODULE.lora_B.weight" [out, rank], by diffusers' names of the
    transformer's modules. text_lora: the same for CLIP's text encoder. rows: the token embeddings of the placeholders,
    by encoder ("clip", "t5"), [vectors, width].
    """

    lora: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    text_lora: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """The state of training after a step.

    phase, phase_key: the phase that was training; a run resumes only into a phase with the same key. step: optimization
    steps since the run began. optimizer: state tensors as "PARAMETER/STATE". scalars: JSON values (Prodigy's d, step
    counts, the loop's TrainState). No generator state is needed: random numbers are functions of the seed and the step.
    """

    phase: str
    phase_key: str
    step: int
    weights: Weights
    optimizer: Mapping[str, Tensor]
    scalars: Mapping[str, Any]


def named_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors by their names in the file."""
    return {
        **{f"lora/{name}": tensor for name, tensor in checkpoint.weights.lora.items()},
        **{f"rows/{name}": tensor for name, tensor in checkpoint.weights.rows.items()},
        **{f"text_lora/{name}": tensor for name, tensor in checkpoint.weights.text_lora.items()},
        **{f"optimizer/{name}": tensor for name, tensor in checkpoint.optimizer.items()},
    }


def copy_to_host(checkpoint: Checkpoint) -> Checkpoint:
    """A copy in host memory, so that training may go on while it is written."""
    return _from_tensors(
        checkpoint.phase, checkpoint.phase_key, checkpoint.step, copy_out(named_tensors(checkpoint)), checkpoint.scalars
    )


def write(path: Path, checkpoint: Checkpoint, *, disk: files.Disk = files.DISK) -> None:
    """Write a checkpoint beside its place, sync it and rename it. Raises OSError."""
    header = {
        "format": str(FORMAT),
        "phase": checkpoint.phase,
        "phase_key": checkpoint.phase_key,
        "step": str(checkpoint.step),
        "scalars": json.dumps(checkpoint.scalars, sort_keys=True),
    }
    tensors.save(path, named_tensors(checkpoint), header, disk=disk)


def read(path: Path) -> Checkpoint:
    """Read a checkpoint and verify its digest and its name.

    Raises BadFileError if the file is damaged, and OSError if it could not be read for a reason outside the file.
    """
    try:
        loaded, header = tensors.load(path)
    except BadFileError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in UNRELATED_ERRORS:
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
    return _from_tensors(phase, key, step, loaded, scalars)


def _from_tensors(
    phase: str, key: str, step: int, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> Checkpoint:
    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    weights = Weights(under("lora/"), under("rows/"), under("text_lora/"))
    return Checkpoint(phase, key, step, weights, under("optimizer/"), scalars)
