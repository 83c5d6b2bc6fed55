"""torch's variable-length attention: all samples of a packed batch in one kernel, on CUDA in half precision.

Elsewhere, and on versions of torch without it, samples are attended to one after the other (`attention.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

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


def is_usable(query: torch.Tensor) -> bool:
    """Whether queries like this one, `[..., head_dim]`, can go through these functions."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16) or varlen_attn is None:
        return False
    head_dim = query.shape[-1]
    return head_dim % 8 == 0 and head_dim <= 256 and _agrees_with_sdpa(query.device, query.dtype, head_dim)


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


@cache
def _agrees_with_sdpa(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether this torch on this device computes what these functions promise.

    The signature, the hardware it runs on and the layout of the log-sum-exp have changed between versions, so one
    small batch decides, once.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    counts, scale = [5, 9], head_dim**-0.5
    query, keys, values = random(4, 14, head_dim), random(2, 14, head_dim), random(2, 14, head_dim)
    newest = random(2, 4, 1, head_dim)
    lengths = to_device([4, 7], torch.int32, device)
    segments = Segments.of(counts, device)
    try:
        packed = attend_packed(query, keys, values, segments, scale)
        single, lse = attend_with_lse(query[:, :5], keys[:, :5], values[:, :5], scale, causal=True)
        last = attend_last(newest, keys, values, Segments(segments.offsets, 7), lengths, scale)
    except (RuntimeError, TypeError, ValueError):
        return False

    def expected(rows: torch.Tensor, start: int, stop: int, causal: bool) -> torch.Tensor:
        own, read = (part[None, :, start:stop].repeat_interleave(2, dim=1).float() for part in (keys, values))
        return F.scaled_dot_product_attention(rows[None].float(), own, read, is_causal=causal, scale=scale)[0]

    scores = query[:, :5].float() @ keys[:, :5].repeat_interleave(2, dim=0).float().transpose(1, 2) * scale
    hidden = torch.ones(5, 5, dtype=torch.bool, device=device).triu(1)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = [
        (packed[:, :5], expected(query[:, :5], 0, 5, True)),
        (packed[:, 5:], expected(query[:, 5:], 5, 14, True)),
        (single, expected(query[:, :5], 0, 5, True)),
        (last[0].transpose(0, 1), expected(newest[0], 0, 4, False)),
        (last[1].transpose(0, 1), expected(newest[1], 5, 12, False)),
        (lse, scores.masked_fill(hidden, -torch.inf).logsumexp(-1)),
    ]
    return all(got.shape == want.shape and torch.allclose(got.float(), want, atol=0.02) for got, want in pairs)
