"""Attention of one sample's rows: fused, and aware of what a stage lets text read.

All tensors are without a batch axis: queries `[heads, rows, head_dim]`, keys and values
`[kv_heads, rows, head_dim]`; a group of heads shares a KV head. Nothing of size rows x rows is ever built.

The published code computes all attention weights, sets some to zero and does not renormalise. The same comes out
of ordinary attention over fewer keys: with T the non-visual keys a row may see, att_T its attention over T alone
and p the share of its softmax mass on T, weights zeroed on the image give p * att_T. In terms of log-sum-exps of
the scores, p = exp(lse_T - lse_all) = sigmoid(lse_T - lse_image).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from . import varlen
from .decisions import Read, Treatment
from .errors import UnsupportedCallError
from .rows import Rows

# Scores that are only needed for their log-sum-exp are computed this many at a time (float32: 16 MiB).
SCORE_CHUNK = 1 << 22

# Where the kernel under F.scaled_dot_product_attention hands its log-sum-exp out. Elsewhere the scores are computed
# once more for it.
FUSED_LSE_DEVICES = ("cpu",)


@dataclass
class Tally:
    """Counts the work of attention calls, in pairs summed over query heads.

    Attributes:
        scores: query-key pairs multiplied.
        values: weight-value pairs summed.
    """

    scores: int = 0
    values: int = 0

    def add(self, query: torch.Tensor, keys: torch.Tensor, values: bool = True) -> None:
        pairs = query.shape[0] * query.shape[1] * keys.shape[1]
        self.scores += pairs
        self.values += pairs * values


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, *, causal: bool, tally: Tally
) -> torch.Tensor:
    """Fused attention, `[heads, rows, head_dim]`. `causal` needs as many keys as queries."""
    tally.add(query, keys)
    if query.shape[1] == 1:
        return attend_one(query[None], keys[None], values[None], scale)[0]
    grouped = query.shape[0] != keys.shape[0]
    output = F.scaled_dot_product_attention(
        query[None], keys[None], values[None], is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return output[0]


def attend_one(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of one row a sample, `[batch, heads, 1, head_dim]`, to all keys, `[batch, kv_heads, rows, head_dim]`.

    The heads of a group become the rows of one: told of groups, kernels for a CPU repeat every key and value first,
    which takes several times as long as attending to them.
    """
    folded = query.unflatten(1, (keys.shape[1], -1)).squeeze(-2)
    output = F.scaled_dot_product_attention(folded, keys, values, scale=scale)
    return output.flatten(1, 2).unsqueeze(-2)


def attend_with_lse(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, *, causal: bool, tally: Tally
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend`, and the log-sum-exp of each row's scores, `[heads, rows]`, float32 or wider.

    Kernels hand their log-sum-exp out without a gradient, so that training computes it once more.
    """
    if torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad):
        output = attend(query, keys, values, scale, causal=causal, tally=tally)
        return output, score_lse(query, keys, scale, causal=causal, tally=tally)
    if query.device.type in FUSED_LSE_DEVICES:
        tally.add(query, keys)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[None], keys[None], values[None], 0.0, causal, scale=scale
        )
        return output[0], lse[0]
    if varlen.is_usable(query):
        tally.add(query, keys)
        return varlen.attend_with_lse(query, keys, values, scale, causal=causal)
    output = attend(query, keys, values, scale, causal=causal, tally=tally)
    return output, score_lse(query, keys, scale, causal=causal, tally=tally)


def score_lse(
    query: torch.Tensor, keys: torch.Tensor, scale: float, *, causal: bool = False, tally: Tally
) -> torch.Tensor:
    """Log-sum-exp of each row's scores, `[heads, rows]`, from keys alone: no value is read."""
    tally.add(query, keys, values=False)
    heads, rows, head_dim = query.shape
    kv_heads, num_keys, _ = keys.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = keys.to(wide).transpose(1, 2)
    grouped = query.view(kv_heads, heads // kv_heads, rows, head_dim)
    step = max(1, SCORE_CHUNK // (heads * num_keys))

    def lse_of(block: torch.Tensor, start: int) -> torch.Tensor:
        scores = (block.flatten(1, 2) @ keys * scale).view(*block.shape[:3], num_keys)
        if causal:
            row = torch.arange(start, start + block.shape[2], device=query.device)[:, None]
            scores.masked_fill_(torch.arange(num_keys, device=query.device) > row, -torch.inf)
        return torch.logsumexp(scores, dim=-1).flatten(0, 1)

    parts = []
    for start in range(0, rows, step):
        block = grouped[:, :, start : start + step].to(wide)
        # With a gradient to come, the scores are computed again for it rather than kept.
        parts.append(
            checkpoint(lse_of, block, start, use_reentrant=False) if block.requires_grad else lse_of(block, start)
        )
    return torch.cat(parts, dim=1)


def attend_behind(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    tally: Tally,
) -> torch.Tensor:
    """Causal attention of the last `rows` of more keys: row i sees all earlier keys and itself.

    The earlier keys and the rows' own are attended to apart and merged by their log-sum-exps, so that no mask
    is needed.
    """
    rows, num_keys = query.shape[1], keys.shape[1]
    if rows == num_keys:
        return attend(query, keys, values, scale, causal=True, tally=tally)
    if rows == 1:
        return attend(query, keys, values, scale, causal=False, tally=tally)
    past = num_keys - rows
    before, lse_before = attend_with_lse(query, keys[:, :past], values[:, :past], scale, causal=False, tally=tally)
    own, lse_own = attend_with_lse(query, keys[:, past:], values[:, past:], scale, causal=True, tally=tally)
    share = torch.sigmoid(lse_before - lse_own)[..., None]
    return (share * before + (1 - share) * own).to(query.dtype)


def attend_prompt(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    rows: Rows,
    treatment: Treatment,
    tally: Tally,
) -> torch.Tensor:
    """Prefill attention of one prompt's rows under `treatment`, `[heads, rows, head_dim]`.

    Visual rows that are not updated ask nothing: their queries are not read and their outputs are 0.
    """
    read, update = treatment.read, treatment.update
    if not rows.runs or (read is Read.ALL and update):
        return attend(query, keys, values, scale, causal=True, tally=tally)
    prompt = slice(0, rows.num_prompt)
    own = query[:, prompt], keys[:, prompt], values[:, prompt]
    if read is Read.ALL:
        output = _attend_frozen(*own, scale, rows, tally)
    elif read is Read.NO_IMAGE:
        output = _read_no_image(*own, scale, rows, update, tally)
    elif update:
        output = _read_sink(*own, scale, rows, read, tally)
    else:
        raise UnsupportedCallError(
            "layer 0 cannot freeze visual rows and collapse text's attention on them (shallow stage) at once; leave "
            "layer 0 out of 'frozen_layers', or the shallow stage out of 'mode'"
        )
    if rows.num_prompt < rows.count:
        # Draft tokens are decoded tokens: no treatment touches them.
        drafts = attend_behind(query[:, rows.num_prompt :], keys, values, scale, tally)
        output = torch.cat([output, drafts], dim=1)
    return output


def _attend_frozen(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, rows: Rows, tally: Tally
) -> torch.Tensor:
    """Ordinary attention of the rows that are not visual, stretch by stretch between the images."""
    output = torch.zeros_like(query)
    begin = 0
    for first, stop in [*rows.runs, (rows.num_prompt, rows.num_prompt)]:
        if begin < first:
            text = slice(begin, first)
            output[:, text] = attend_behind(query[:, text], keys[:, :first], values[:, :first], scale, tally)
        begin = stop
    return output


def _read_no_image(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    rows: Rows,
    update: bool,
    tally: Tally,
) -> torch.Tensor:
    """`Read.NO_IMAGE`: p * att_T for text rows, whose image scores are computed but no image value is read."""
    output = torch.empty_like(query) if update else torch.zeros_like(query)
    for number, (first, stop) in enumerate(rows.runs if update else []):
        # The rows before the first run see no image, so they may share its call.
        begin = 0 if number == 0 else first
        output[:, begin:stop] = attend_behind(query[:, begin:stop], keys[:, :stop], values[:, :stop], scale, tally)

    text = rows.text_index(query.device)
    text_query = query[:, text]
    text_output, text_lse = attend_with_lse(text_query, keys[:, text], values[:, text], scale, causal=True, tally=tally)
    image_lse = torch.full_like(text_lse, -torch.inf)
    for first, stop in rows.runs:
        behind = int(rows.text.searchsorted(stop))
        if behind < len(rows.text):
            run_lse = score_lse(text_query[:, behind:], keys[:, first:stop], scale, tally=tally)
            # Not in place: a gradient needs what was there.
            image_lse = torch.cat([image_lse[:, :behind], torch.logaddexp(image_lse[:, behind:], run_lse)], dim=1)
    output[:, text] = (torch.sigmoid(text_lse - image_lse)[..., None] * text_output).to(query.dtype)
    return output


def _read_sink(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    rows: Rows,
    read: Read,
    tally: Tally,
) -> torch.Tensor:
    """Layer 0: visual rows get p * att_T; text rows what `FIRST_SINK` or `HALF_SINK` says."""
    text = rows.text_index(query.device)
    text_keys, text_values = keys[:, text], values[:, text]
    if read is Read.HALF_SINK:
        # Zeroed weights and zeroed values are the same thing to the sum.
        hidden = varlen.to_device(torch.from_numpy(rows.visual[: len(rows.visual) // 2]), torch.int64, values.device)
        values = values.index_fill(1, hidden, 0)
    output, lse = attend_with_lse(query, keys, values, scale, causal=True, tally=tally)
    output = output.clone()

    for first, stop in rows.runs:
        earlier = int(rows.text.searchsorted(first))
        if earlier == 0:
            output[:, first:stop] = 0
            continue
        part, part_lse = attend_with_lse(
            query[:, first:stop],
            text_keys[:, :earlier],
            text_values[:, :earlier],
            scale,
            causal=False,
            tally=tally,
        )
        output[:, first:stop] = ((part_lse - lse[:, first:stop]).exp()[..., None] * part).to(query.dtype)

    if read is Read.FIRST_SINK:
        # The rows before the image have nothing to collapse.
        first_visual = rows.runs[0][0]
        part, part_lse = attend_with_lse(query[:, text], text_keys, text_values, scale, causal=True, tally=tally)
        own = (part_lse - lse[:, text]).exp()[:, first_visual:, None]
        sink = values[:, first_visual].repeat_interleave(query.shape[0] // values.shape[0], dim=0)[:, None]
        output[:, text[first_visual:]] = (own * part[:, first_visual:] + (1 - own) * sink).to(query.dtype)
    return output
