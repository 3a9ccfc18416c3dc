"""Models that a worker process keeps on the device from phase to phase and from run to run.

The frozen transformer, without adapters: reading FLUX.1's 24 GB again at every pivot, export and next run would cost a
queue more time than its shortest runs take. And the text encoders that have just learned.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from runner.base.files import fingerprint
from runner.model import device, lora
from runner.model.base import Base
from runner.model.families import family_of
from runner.spec.schema import Model


@dataclass
class ModelPool:
    """Holds one transformer at most.

    `acquire` passes ownership: a transformer that is not released, after an error, is dropped. live_encoders: those
    that have just learned, kept for the pass that encodes the captions with what they learned.
    """

    key: str = ""
    transformer: nn.Module | None = None
    live_encoders: dict[str, Any] = field(default_factory=dict)

    def acquire(self, base: Base) -> nn.Module:
        """The base's transformer without adapters, in eval mode: the one in the pool if it is the same, else a loaded
        one."""
        if self.transformer is None or self.key != _key(base):
            self.clear(base)
            return family_of(base).load_transformer(base)
        transformer, self.transformer = self.transformer, None
        return transformer

    def release(self, base: Base, model: Model, transformer: nn.Module) -> None:
        """Put an acquired transformer back, without adapters. A compiled one is dropped: its code contains the
        adapters. model: the spec's table."""
        if model.compile:
            return
        lora.detach_lora(transformer)
        family_of(base).end_training(transformer)
        self.key, self.transformer = _key(base), transformer.requires_grad_(False).eval()

    def clear(self, base: Base) -> None:
        """Free the transformer, to make room for a model that runs without it."""
        if self.transformer is not None:
            self.transformer = None
            device.release(base.device)

    @property
    def bytes(self) -> int:
        """Memory of the pool's transformer on its device; offloaded blocks wait in host memory and do not count."""
        tensors = list(self.transformer.state_dict().values()) if self.transformer is not None else []
        device_type = "cuda" if any(tensor.is_cuda for tensor in tensors) else "cpu"
        return sum(tensor.nbytes for tensor in tensors if tensor.device.type == device_type)


def _key(base: Base) -> str:
    """Equal for bases whose transformers are equal: the files, and everything that changes how they are loaded."""
    facts: list[Any] = [str(base.folder), fingerprint(base.folder / "transformer"), base.variant, str(base.device)]
    return json.dumps([*facts, str(base.dtype), base.quantize, base.offload])
