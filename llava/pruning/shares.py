"""How much one visual token matters to the prompt's last row, layer by layer (paper: middle and deep stages).

With o the last row's attention output (heads concatenated, before the output projection) and c_i the share
visual token i has in it, the method asks two things of every i: how far the output would turn without it,
`s_i = cos(o - c_i, o)`, and how long the share is, `r_i = ||c_i||`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Shares(NamedTuple):
    """Each float32 [num_visual], in row order, on the device.

    Attributes:
        cosine: `cos(o - c_i, o)`.
        norm: `||c_i||_2`.
        attention: weight of the last row on visual row i, mean over heads.
    """

    cosine: torch.Tensor
    norm: torch.Tensor
    attention: torch.Tensor


def measure_visual_shares(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    visual: torch.Tensor | slice,
    scale: float,
) -> Shares:
    """Every visual row's share of the last row's attention output, without forming a single share.

    Closed form: `o·c_i = Σ_h w_hi (o_h·v_hi)`, `||c_i||² = Σ_h w_hi² ||v_hi||²` and
    `s_i = (||o||² - o·c_i) / (||o|| ||o - c_i||)`; one row of scores and one pass over the visual values.

    Args:
        query: the last row's query after RoPE, [heads, head_dim].
        keys, values: all rows that it may see, [kv_heads, rows, head_dim]; heads of a group share one.
        output: the last row's attention output, [heads, head_dim].
        visual: the visual rows among `rows`: a slice, or an int64 index [num_visual].
        scale: of the scores.

    Returns:
        Float32 measures, whatever the model's dtype: in bfloat16 a threshold of 0.995 would mean 0.992.
    """
    heads, head_dim = query.shape
    kv_heads = keys.shape[0]
    grouped = (kv_heads, heads // kv_heads, head_dim)
    query, output = query.float().view(grouped), output.float().reshape(grouped)

    weights = torch.softmax(query @ keys.float().transpose(1, 2) * scale, dim=-1)[:, :, visual]  # [kv, group, visual]
    visual_values = values[:, visual].float()  # [kv, visual, head_dim]

    dot = (weights * (output @ visual_values.transpose(1, 2))).sum((0, 1))
    share_squared = (weights.square() * visual_values.square().sum(-1)[:, None]).sum((0, 1))
    output_squared = output.square().sum()
    rest_squared = (output_squared - 2 * dot + share_squared).clamp_min(torch.finfo(torch.float32).tiny)
    cosine = (output_squared - dot) / (output_squared.sqrt() * rest_squared.sqrt())
    return Shares(cosine, share_squared.sqrt(), weights.mean((0, 1)))
