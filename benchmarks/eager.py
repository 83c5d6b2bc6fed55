"""How published code prunes: all attention weights are formed, then some are zeroed. A stand-in to time against.

It computes what VisiPruner's published implementation computes, in the same order of operations and for one prompt:
float32 softmax over `[heads, rows, rows]`, zeroed columns, one share of the output per visual row and its cosine,
and a transfer to the host in each probed layer. Decisions are forced, as in the other variants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import eager_mask

from .shapes import Schedule

NAME = "benchmark_mask_after_softmax"


class _State:
    def __init__(self, visual: torch.Tensor, schedule: Schedule):
        self.first_visual = int(visual.nonzero()[0])
        self.visual = visual.clone()  # of the rows that are still there
        self.schedule = schedule
        self.prefill = True
        self.rows: torch.Tensor | None = None  # survivors of the prompt's rows

    def before_layer(self, layer: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = args[0]
        if layer == 0:
            self.prefill = hidden.shape[1] > 1
        kwargs["pruning_state"] = self
        if not self.prefill:
            kwargs["attention_mask"] = None
            return args, kwargs
        if layer == self.schedule.leave:
            keep = ~self.visual
        elif layer == self.schedule.select + 1:
            keep = ~self.visual
            keep[self.visual.nonzero()[self.kept, 0]] = True
        else:
            keep = None
        if keep is not None:
            local = keep.nonzero()[:, 0]
            hidden = hidden[:, local]
            self.visual = self.visual[local]
            self.rows = local if self.rows is None else self.rows[local]
        if self.rows is not None:
            rows = self.rows
            kwargs["position_embeddings"] = tuple(part[:, rows] for part in kwargs["position_embeddings"])
            if kwargs.get("attention_mask") is not None:
                kwargs["attention_mask"] = kwargs["attention_mask"][:, :, rows][..., rows]
        return (hidden, *args[1:]), kwargs

    def edit(self, layer: int, weights: torch.Tensor) -> None:
        """The shallow stage, in place."""
        first, stop = self.first_visual, self.first_visual + int(self.visual.sum())
        if layer == 0:
            weights[:, :, stop:, first] = weights[:, :, stop:, first:stop].sum(-1)
            weights[:, :, first:stop, first:stop] = 0
            weights[:, :, stop:, first + 1 : stop] = 0
        else:
            weights[:, :, stop:, first:stop] = 0

    def probe(self, weights: torch.Tensor, values: torch.Tensor, output: torch.Tensor, layer: int) -> None:
        """Every visual row's share of the last row's output, formed one by one."""
        visual = self.visual.nonzero()[:, 0]
        shares = weights[0, :, -1, visual, None] * values[0, :, visual]  # [heads, visual, head_dim]
        shares = shares.transpose(0, 1).flatten(1)
        last = output[0, :, -1].flatten()[None]
        cosine = F.cosine_similarity(last - shares, last, dim=-1)
        norm = shares.norm(dim=-1)
        bool((cosine < 0.995).any())  # the published code asks the host here
        if layer == self.schedule.select:
            self.kept = norm.topk(min(self.schedule.kept, len(norm))).indices.sort().values


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    pruning_state: _State | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    state, layer = pruning_state, module.layer_idx
    if state.prefill and layer < state.schedule.shallow:
        state.edit(layer, weights)
    output = weights @ value
    if state.prefill and state.schedule.shallow < layer < state.schedule.leave:
        state.probe(weights, value, output, layer)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def mask_after_softmax(model: nn.Module, visual: torch.Tensor, schedule: Schedule) -> Iterator[None]:
    """`visual`: bool [1, rows] of the one prompt that runs inside the block."""
    state = _State(visual[0], schedule)
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, number=number: state.before_layer(number, args, kwargs), with_kwargs=True
        )
        for number, layer in enumerate(model.model.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        config._attn_implementation = before
