"""The processes that train one run together, one per GPU: the same weights in all, gradients averaged, rank 0 writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

PATIENCE = timedelta(hours=24)  # the others wait while rank 0 encodes a large data set


@dataclass(frozen=True)
class Ranks:
    """`rank` of `count`. Alone, every method does nothing and costs nothing."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def meet(self) -> Any:
        """A store (torch.distributed.TCPStore) where the others find rank 0, which calls this. Its `.port` of this machine is
        chosen by the system, and kept from then on."""
        return TCPStore("127.0.0.1", 0, self.count, is_master=True, timeout=PATIENCE, wait_for_workers=False)

    def find(self, port: int) -> Any:
        """The same for the others."""
        return TCPStore("127.0.0.1", port, self.count, is_master=False, timeout=PATIENCE)

    def join(self, store: Any, device: torch.device) -> None:
        """Wait for the others. store: of `meet` or `find`."""
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.count, timeout=PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )  # fmt: skip

    def leave(self) -> None:
        if self.count > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

    def wait(self) -> None:
        if self.count > 1:
            distributed.barrier()

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is up in any process."""
        if self.count == 1:
            return flag
        up = torch.tensor(float(flag), device=device)
        distributed.all_reduce(up, distributed.ReduceOp.MAX)
        return bool(up.item())

    def average(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Average the gradients over the processes, in place; returns the averaged loss. One exchange for all of it."""
        if self.count == 1:
            return loss
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([loss.reshape(1), *(gradient.reshape(-1) for gradient in gradients)])
        distributed.all_reduce(flat)
        flat /= self.count
        start = 1
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
        return flat[0]
