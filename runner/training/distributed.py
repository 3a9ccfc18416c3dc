"""Data-parallel training: one process per GPU, equal weights in all, gradients averaged; rank 0 writes the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

TIMEOUT = timedelta(hours=24)  # long, because the other ranks wait while rank 0 encodes a large data set


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `count`. With a count of 1 every method does nothing and costs nothing."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def meet(self) -> Any:
        """Open the store (torch.distributed.TCPStore) where the other ranks find rank 0, which calls this. The system
        chooses its `.port`, which is free on this machine and stays taken from then on."""
        return TCPStore("127.0.0.1", 0, self.count, is_master=True, timeout=TIMEOUT, wait_for_workers=False)

    def find(self, port: int) -> Any:
        """Connect to the store that rank 0 opened."""
        return TCPStore("127.0.0.1", port, self.count, is_master=False, timeout=TIMEOUT)

    def join(self, store: Any, device: torch.device) -> None:
        """Wait until all ranks have joined. store: from `meet` or `find`."""
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.count, timeout=TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )  # fmt: skip

    def leave(self) -> None:
        """End the process group, if there is one."""
        if self.count > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

    def wait(self) -> None:
        """Wait until all ranks get here."""
        if self.count > 1:
            distributed.barrier()

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any rank. device: the one that this rank trains on."""
        if self.count == 1:
            return flag
        highest = torch.tensor(float(flag), device=device)
        distributed.all_reduce(highest, distributed.ReduceOp.MAX)
        return bool(highest.item())

    def average(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Average the gradients over the ranks, in place, and return the average of the loss (a scalar). One
        all-reduce."""
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
