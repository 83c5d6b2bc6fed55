"""What a call of transformers' `generate` asks for, and what of it pruning cannot honour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache

from .errors import UnsupportedCallError


class GenerationOptions:
    """What a `generate` call really asks for: its keywords, else its generation config, else the model's."""

    def __init__(self, model: nn.Module, kwargs: Mapping[str, Any]):
        self.model = model
        self.kwargs = kwargs
        self.configs = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]

    def get(self, name: str, default: Any = None) -> Any:
        if self.kwargs.get(name) is not None:
            return self.kwargs[name]
        for config in self.configs:
            if getattr(config, name, None) is not None:
                return getattr(config, name)
        return default

    @property
    def expand_size(self) -> int:
        """Copies of each prompt in the batch that the model sees."""
        return max(self.get("num_beams", 1), self.get("num_return_sequences", 1))

    @property
    def is_assisted(self) -> bool:
        """Whether draft tokens come with the prompt."""
        return any(self.get(name) for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"))

    def refuse_unsupported(self) -> None:
        """Raise `UnsupportedCallError` for what would silently go wrong."""
        refused = {
            "prefill_chunk_size": "the prompt must be prefilled in one piece",
            "penalty_alpha": "contrastive search is not supported",
            "guidance_scale": "guidance prefills a second prompt, without the image",
            "dola_layers": "DoLa reads layers that hold different rows",
            "output_attentions": "attention is fused, its weights are never formed",
            "custom_generate": "only transformers' own decoding methods are supported",
            "assistant_early_exit": "self-speculation skips the layers that decide",
        }
        for name, reason in refused.items():
            if self.get(name):
                raise UnsupportedCallError(f"{name}={self.get(name)!r} cannot be used with pruning: {reason}")
        if self.get("use_cache", True) is False:
            raise UnsupportedCallError("use_cache=False cannot be used with pruning: decisions fall once, in prefill")
        kind = self.get("cache_implementation")
        if kind not in (None, "dynamic"):
            raise UnsupportedCallError(
                f"cache_implementation={kind!r} cannot be used with pruning: layers hold different numbers of rows; "
                "leave it at the default"
            )
        if self.get("assistant_model") is self.model:
            raise UnsupportedCallError(
                "assistant_model is the pruned model itself, so its drafts would be pruned as well; "
                "give another model, or prompt_lookup_num_tokens"
            )
        cache = self.kwargs.get("past_key_values")
        if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length() > 0):
            raise UnsupportedCallError(
                "past_key_values must be an empty DynamicCache with pruning: a new question must not be asked of "
                "rows that were pruned for an old one; pass the whole conversation again"
            )
