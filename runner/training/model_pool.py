"""What a trainer process keeps on the device from phase to phase and from run to run: the frozen transformer, bare.

Reading FLUX.1's 24 GB again at every pivot, export and next run would cost a batch more than its shortest runs take.
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
    """One transformer at most. It is lent whole: whoever takes it is its only owner until it is put back, so one that
    was on its way when something went wrong is never seen again. `live`: encoders that have just learned, for the one
    pass that encodes what they make of the captions."""

    key: str = ""
    kept: nn.Module | None = None
    live: dict[str, Any] = field(default_factory=dict)

    def take(self, base: Base) -> nn.Module:
        """The base's transformer without adapters, in eval mode: the one kept where it is the same, or else a loaded one."""
        wanted = _key(base)
        if self.kept is None or self.key != wanted:
            self.clear(base)
            return family_of(base).load_transformer(base)
        model, self.kept = self.kept, None
        return model

    def put(self, base: Base, own: Model, model: nn.Module) -> None:
        """Take it back for the next one, as it was lent; a compiled one is dropped, since its code has adapters in it."""
        if own.compile:
            return
        lora.detach_lora(model)
        family_of(base).end_training(model)
        self.key, self.kept = _key(base), model.requires_grad_(False).eval()

    def clear(self, base: Base) -> None:
        """Give the memory back, for a model that is not needed beside a transformer."""
        if self.kept is not None:
            self.kept = None
            device.release(base.device)

    @property
    def bytes(self) -> int:
        """Held by what is kept, on its device: blocks may wait in host memory."""
        tensors = list(self.kept.state_dict().values()) if self.kept is not None else []
        where = "cuda" if any(tensor.is_cuda for tensor in tensors) else "cpu"
        return sum(tensor.nbytes for tensor in tensors if tensor.device.type == where)


def _key(base: Base) -> str:
    """What makes two transformers the same: the files, and everything that changes how they are loaded."""
    facts: list[Any] = [str(base.folder), fingerprint(base.folder / "transformer"), base.variant, str(base.device)]
    return json.dumps([*facts, str(base.dtype), base.quantize, base.offload])
