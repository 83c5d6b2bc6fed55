"""Where a benchmark ran, how fast that place can be, and what that predicts (roofline)."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

from llava.pruning import PruningTrace
from llava.pruning.flops import DecoderShape
from llava.utils import processor_name

from .timing import interleave


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and load, for the record."""
    facts = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


@dataclass(frozen=True)
class Machine:
    """Measured limits: `flops` of a large matrix product a second, `bandwidth` bytes a second of a large copy."""

    flops: float
    bandwidth: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, repetitions: int = 10) -> Machine:
        on_gpu = device.type == "cuda"
        size = 8192 if on_gpu else 1536
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        source = torch.zeros(1 << (31 if on_gpu else 27), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        timings = interleave(
            {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}, device, repetitions, warmup=3
        )
        product, copy = (min(timings.wall[name]) for name in ("product", "copy"))
        return cls(2 * size**3 / product, 2 * len(source) / copy)  # a copy reads and writes

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def prefill_roofline(
    traces: Sequence[PruningTrace], shape: DecoderShape, dtype: torch.dtype, machine: Machine
) -> float:
    """Seconds a prefill of these samples takes at best: each layer bound by arithmetic or by its weights and rows.

    Linear layers see the rows of all samples together and read their weights once; rows are read and written once
    each by attention and by the MLP.
    """
    width = torch.finfo(dtype).bits // 8
    seconds = 0.0
    for layer in range(shape.num_layers):
        rows = sum(trace.rows_per_layer[layer] for trace in traces)
        pairs = sum(trace.score_pairs[layer] + trace.value_pairs[layer] for trace in traces)
        work = 2 * shape.linear_weights * rows + 2 * shape.head_dim * pairs
        moved = width * (shape.linear_weights + 4 * rows * shape.hidden_size)
        seconds += max(work / machine.flops, moved / machine.bandwidth)
    head = shape.hidden_size * shape.vocab_size
    rows = sum(trace.lm_head_rows for trace in traces)
    return seconds + max(2 * head * rows / machine.flops, width * head / machine.bandwidth)


def decode_bytes(weights: int, kv: int) -> int:
    """Bytes one decoding step has to read: every weight once, and every key and value."""
    return weights + kv
