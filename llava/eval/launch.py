"""The processes of one run, as ``accelerate launch`` or ``torchrun`` started them. They share no GPU work: only who
asks which question, and a word at the start and the end."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# A process that is done early waits for the slowest one, which may take hours.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Launch:
    """This process among its equals: ``rank`` of ``world_size``, ``local_rank`` on this machine."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def start(cls) -> Launch:
        """Read the launcher's environment and meet the other processes."""
        values = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT.items())
        launch = cls(*values)
        if launch.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
        return launch

    @property
    def is_main(self) -> bool:
        """Whether this process prints, merges and names files."""
        return self.rank == 0

    def device(self, asked: str | None) -> str | None:
        """The device of this process: each gets a GPU of its own, unless one was named."""
        uses_cuda = asked == "cuda" or (asked is None and torch.cuda.is_available())
        if self.world_size > 1 and uses_cuda and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return asked

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, by rank, in every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def end(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()


_ENVIRONMENT = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
