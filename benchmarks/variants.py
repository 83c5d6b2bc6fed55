"""What is compared: the same weights under transformers alone, under this project, and the published way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.utils import is_flash_attn_2_available

from llava.pruning import PruningRun, prune

from .eager import mask_after_softmax
from .shapes import Prompts, Schedule, twin

DENSE = "transformers SDPA"
FLASH = "transformers FlashAttention-2"
OURS_DENSE = "this project, dense"
SHALLOW = "this project, shallow stage only"
PRUNED = "this project, pruned"
EAGER = "mask after softmax (published way)"
CEILING = "kernel ceiling"

PHRASES = {
    DENSE: "the unpatched model",
    FLASH: "the unpatched model with FlashAttention-2",
    OURS_DENSE: "inside `prune(model, None)`",
    SHALLOW: 'mode `["shallow"]`: nothing is dropped',
    PRUNED: "the forced schedule, probe included",
    EAGER: "eager attention, masks after the softmax, shares formed one by one",
    CEILING: "the unpatched layers called with the pruned row counts, nothing else",
}


@dataclass(frozen=True)
class Variant:
    """A model and the block under which it runs; `block(prompts)` yields a `PruningRun` for this project's."""

    name: str
    model: nn.Module
    block: Callable[[Prompts], AbstractContextManager]

    @torch.no_grad()
    def prefill(self, prompts: Prompts) -> Any:
        """One prefill, the block's opening and closing included; only the last row gets logits."""
        with self.block(prompts):
            return self.forward(prompts)

    @torch.no_grad()
    def forward(self, prompts: Prompts) -> Any:
        """One prefill inside a block that is open."""
        return self.model(**prompts.kwargs, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def generate(self, prompts: Prompts, tokens: int) -> torch.Tensor:
        """A whole request after the vision tower: greedy, exactly `tokens` new tokens, `[batch, tokens]`."""
        with self.block(prompts):
            return self.model.generate(
                **prompts.kwargs,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )


def make_variants(
    model: nn.Module, schedules: list[Schedule], names: list[str] | None = None, batch: int = 1
) -> dict[str, Variant]:
    """All variants that can run here, on one set of weights. `schedules` are handed to the samples in turn."""

    def plain(prompts: Prompts) -> AbstractContextManager:
        return nullcontext()

    def pruned(prompts: Prompts) -> AbstractContextManager[PruningRun]:
        turns = cycle(schedule.method() for schedule in schedules)
        each = [next(turns) for _ in range(len(prompts.visual))]
        return prune(pruned_model, each, visual_mask=prompts.visual)

    def dense(prompts: Prompts) -> AbstractContextManager[PruningRun]:
        return prune(dense_model, None, visual_mask=prompts.visual)

    def shallow(prompts: Prompts) -> AbstractContextManager[PruningRun]:
        config = {"mode": ["shallow"], "shallow_mid_layer": schedules[0].shallow, "shallow_sink": "first"}
        return prune(shallow_model, config, visual_mask=prompts.visual)

    def eager(prompts: Prompts) -> AbstractContextManager:
        return mask_after_softmax(eager_model, prompts.visual, schedules[0])

    dense_model, shallow_model, pruned_model, eager_model = (twin(model) for _ in range(4))
    variants = {
        DENSE: Variant(DENSE, model, plain),
        OURS_DENSE: Variant(OURS_DENSE, dense_model, dense),
        SHALLOW: Variant(SHALLOW, shallow_model, shallow),
        PRUNED: Variant(PRUNED, pruned_model, pruned),
    }
    if batch == 1:  # the published code takes one prompt at a time
        variants[EAGER] = Variant(EAGER, eager_model, eager)
    if model.device.type == "cuda" and model.dtype in (torch.float16, torch.bfloat16) and is_flash_attn_2_available():
        flash_model = twin(model)
        flash_model.config._attn_implementation = "flash_attention_2"
        variants[FLASH] = Variant(FLASH, flash_model, plain)
    return {name: variant for name, variant in variants.items() if names is None or name in names}


@torch.no_grad()
def run_layers(model: nn.Module, prompts: Prompts, rows_per_layer: list[int]) -> torch.Tensor:
    """The unpatched layers at given row counts: what any engine around these kernels could reach at best."""
    hidden = prompts.embeds
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    rotary = model.model.rotary_emb(hidden, position_ids=positions)
    cache = DynamicCache()
    for layer, rows in zip(model.model.layers, rows_per_layer, strict=True):
        if rows != hidden.shape[1]:
            hidden, rotary = hidden[:, :rows].contiguous(), tuple(part[:, :rows] for part in rotary)
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, past_key_values=cache, use_cache=True)
    return model.lm_head(model.model.norm(hidden)[:, -1:])


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of memory a KV cache holds on to, spare rows and whatever its tensors are views of included."""
    storages = {}
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
