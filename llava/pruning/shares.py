"""How much one visual token matters to a row of the prompt, layer by layer (paper: middle and deep stages).

With o the row's attention output (heads concatenated, before the output projection) and c_i the share
visual token i has in it, the method asks two things of every i: how far the output would turn without it,
`s_i = cos(o - c_i, o)`, and how long the share is, `r_i = ||c_i||`. The paper's row is the prompt's last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MOST_SCORES = 2**24
"""Scores of several rows that stand in memory at once, 64 MiB in float32."""


class Shares(NamedTuple):
    """Each float32 [num_visual], in row order, on the device.

    Attributes:
        cosine: `cos(o - c_i, o)`.
        norm: `||c_i||_2`.
        part: `||c_i||_2 / ||o||_2`.
        attention: weight of the row on visual row i, mean over heads.
    """

    cosine: torch.Tensor
    norm: torch.Tensor
    part: torch.Tensor
    attention: torch.Tensor


def measure_visual_shares(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    visual: torch.Tensor | slice,
    scale: float,
) -> Shares:
    """Every visual row's share of one row's attention output, without forming a single share.

    Closed form: `o·c_i = Σ_h w_hi (o_h·v_hi)`, `||c_i||² = Σ_h w_hi² ||v_hi||²` and
    `s_i = (||o||² - o·c_i) / (||o|| ||o - c_i||)`; one row of scores and one pass over the visual values.

    Args:
        query: the row's query after RoPE, [heads, head_dim].
        keys, values: all rows that it may see, [kv_heads, rows, head_dim]; heads of a group share one.
        output: the row's attention output, [heads, head_dim].
        visual: the visual rows among `rows`: a slice, or an int64 index [num_visual].
        scale: of the scores.

    Returns:
        Float32 measures, whatever the model's dtype: in bfloat16 a threshold of 0.995 would mean 0.992.
    """
    one_row = _measure(query[:, None], keys.float(), values[:, visual].float(), output[:, None], visual, scale)
    return Shares(*(measure[0] for measure in one_row))


def measure_largest_shares(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    visual: torch.Tensor | slice,
    scale: float,
    asking: torch.Tensor,
) -> Shares:
    """Every visual row's largest share among several rows behind it: the smallest cosine, and the largest norm, part
    and attention, each for itself.

    Args:
        query, output: of the asking rows, [heads, asking, head_dim].
        keys, values, visual, scale: as in `measure_visual_shares`, of all rows.
        asking: places of the asking rows among `rows`, int64 [asking].

    Returns:
        As `measure_visual_shares`; a visual row that no asking row stands behind has cosine inf and shares of 0.
    """
    keys, visual_values = keys.float(), values[:, visual].float()
    size = max(1, MOST_SCORES // (query.shape[0] * keys.shape[1]))
    chunks = [slice(start, start + size) for start in range(0, len(asking), size)]
    measured = [
        _measure(query[:, rows], keys, visual_values, output[:, rows], visual, scale, asking[rows]) for rows in chunks
    ]
    cosine, *lengths = (torch.cat(measure) for measure in zip(*measured, strict=True))
    return Shares(cosine.amin(0), *(length.amax(0) for length in lengths))


def _measure(
    query: torch.Tensor,
    keys: torch.Tensor,
    visual_values: torch.Tensor,
    output: torch.Tensor,
    visual: torch.Tensor | slice,
    scale: float,
    asking: torch.Tensor | None = None,
) -> Shares:
    """Shares in the output of each asking row, [asking, num_visual]. `asking`: their places; None: they see all."""
    heads, _, head_dim = query.shape
    kv_heads = len(keys)
    query, output = query.float(), output.float()

    def of_group(each: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Products with what a group of heads shares, [heads, asking, …]."""
        products = each.reshape(kv_heads, -1, head_dim) @ other.transpose(1, 2)
        return products.view(heads, -1, other.shape[1])

    scores = of_group(query, keys) * scale
    if asking is not None:
        unseen = torch.arange(keys.shape[1], device=keys.device) > asking[:, None]
        scores = scores.masked_fill(unseen, -torch.inf)
    weights = torch.softmax(scores, dim=-1)[:, :, visual]

    dot = (weights * of_group(output, visual_values)).sum(0)
    value_squared = visual_values.square().sum(-1).repeat_interleave(heads // kv_heads, 0)
    share_squared = (weights.square() * value_squared[:, None]).sum(0)
    output_squared = output.square().sum((0, 2))[:, None]
    rest_squared = (output_squared - 2 * dot + share_squared).clamp_min(torch.finfo(torch.float32).tiny)
    cosine = (output_squared - dot) / (output_squared.sqrt() * rest_squared.sqrt())
    if asking is not None:
        cosine = cosine.masked_fill(unseen[:, visual], torch.inf)
    norm = share_squared.sqrt()
    return Shares(cosine, norm, norm / output_squared.sqrt(), weights.mean(0))
