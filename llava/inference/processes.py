"""The processes of one run, as ``accelerate launch`` or ``torchrun`` started them. They share no GPU work: only who
asks which question, and a word at the start and the end."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import PartialState

# A process that is done early waits for the slowest one, which may take hours.
_PATIENCE = timedelta(days=30)


def join_processes() -> PartialState:
    """Meet the other processes, over the CPU: a process may be late by hours, and has a GPU to itself meanwhile."""
    over = {"backend": "gloo"} if "LOCAL_RANK" in os.environ else {}
    return PartialState(cpu=True, timeout=_PATIENCE, **over)


def device_of(state: PartialState, asked: str | None) -> str | None:
    """The device of this process: each gets a GPU of its own, unless one was named."""
    uses_cuda = asked == "cuda" or (asked is None and torch.cuda.is_available())
    if state.num_processes > 1 and uses_cuda and torch.cuda.is_available():
        return f"cuda:{state.local_process_index % torch.cuda.device_count()}"
    return asked
