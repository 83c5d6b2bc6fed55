"""torch's variable-length attention: all samples of a packed batch in one kernel, on CUDA in half precision.

Elsewhere, and on versions of torch without it, samples are attended to one after the other (`attention.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch

try:
    from torch.nn.attention import varlen as torch_varlen
except ImportError:  # an older torch
    torch_varlen = None  # type: ignore[assignment]

varlen_attn: Any = getattr(torch_varlen, "varlen_attn", None)

CAUSAL, TWO_WAY = (-1, 0), (-1, -1)


def to_device(values: Sequence[int] | torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A small tensor on `device`, without making the host wait for what the device is doing."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Segments:
    """Where samples lie on a packed row axis.

    Attributes:
        offsets: int32 [samples + 1] on the device; sample i has the rows from `offsets[i]` to `offsets[i + 1]`.
        longest: rows of the longest sample.
    """

    offsets: torch.Tensor
    longest: int

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device) -> Segments:
        return cls(to_device([0, *accumulate(counts)], torch.int32, device), max(counts))


_NEEDED = {"scale", "window_size", "enable_gqa", "seqused_k", "return_aux"}


@cache
def _is_there() -> bool:
    """Whether this torch has the function with all that is asked of it; earlier versions lack some keywords."""
    known = set(inspect.signature(varlen_attn).parameters) if varlen_attn is not None else set()
    return known >= _NEEDED and hasattr(torch_varlen, "AuxRequest")


def is_usable(query: torch.Tensor) -> bool:
    """Whether queries like this one, `[..., head_dim]`, can go through these functions.

    What they compute is compared with ordinary attention by `tests/test_varlen.py`, on a GPU.
    """
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16) or not _is_there():
        return False
    return (
        query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def attend_packed(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    """Causal attention of every sample over its own rows.

    Args:
        query: `[heads, rows of all samples, head_dim]`; keys and values: `[kv_heads, rows, head_dim]`.

    Returns:
        `[heads, rows of all samples, head_dim]`.
    """
    output = varlen_attn(
        *_rows_first(query, keys, values),
        segments.offsets,
        segments.offsets,
        segments.longest,
        segments.longest,
        scale=scale,
        window_size=CAUSAL,
        enable_gqa=query.shape[0] != keys.shape[0],
    )
    return output.transpose(0, 1)


def attend_with_lse(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sample, and the log-sum-exp of each row's scores, float32 `[heads, rows]`."""
    own, all_keys = (Segments.of([part.shape[1]], part.device) for part in (query, keys))
    output, lse = varlen_attn(
        *_rows_first(query, keys, values),
        own.offsets,
        all_keys.offsets,
        own.longest,
        all_keys.longest,
        scale=scale,
        window_size=CAUSAL if causal else TWO_WAY,
        enable_gqa=query.shape[0] != keys.shape[0],
        return_aux=torch_varlen.AuxRequest(lse=True),
    )
    if lse.shape[0] != query.shape[0]:  # some versions give [rows, heads]
        lse = lse.transpose(0, 1)
    return output.transpose(0, 1), lse


def attend_last(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    segments: Segments,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One new row a sample, over the first `lengths` (int32 [batch]) rows of its segment.

    Args:
        query: `[batch, heads, 1, head_dim]`; keys and values: `[kv_heads, rows of all segments, head_dim]`.
        segments: of the storage, spare rows included; its `longest` is the largest of `lengths`.

    Returns:
        `[batch, 1, heads, head_dim]`.
    """
    batch = len(query)
    output = varlen_attn(
        query[:, :, 0],
        keys.transpose(0, 1),
        values.transpose(0, 1),
        torch.arange(batch + 1, dtype=torch.int32, device=query.device),
        segments.offsets,
        1,
        segments.longest,
        scale=scale,
        window_size=TWO_WAY,
        enable_gqa=query.shape[1] != keys.shape[0],
        seqused_k=lengths,
    )
    return output[:, None]


def _rows_first(*parts: torch.Tensor) -> list[torch.Tensor]:
    """`[heads, rows, head_dim]` → `[rows, heads, head_dim]`, views."""
    return [part.transpose(0, 1) for part in parts]
