"""What a call of transformers' `generate` asks for: copies of prompts, drafts, and what pruning cannot honour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache

from .errors import UnsupportedCallError

_REFUSED = {
    "prefill_chunk_size": "the prompt must be prefilled in one piece",
    "penalty_alpha": "contrastive search is not supported",
    "guidance_scale": "guidance prefills a second prompt, without the image",
    "dola_layers": "DoLa reads layers that hold different rows",
    "output_attentions": "attention is fused, its weights are never formed",
    "custom_generate": "only transformers' own decoding methods are supported",
    "assistant_early_exit": "self-speculation skips the layers that decide",
}


_DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


@dataclass(frozen=True)
class Generation:
    """How one `generate` call uses the model.

    Attributes:
        copies: of each prompt in the batch that the model sees (beams, or sequences to return).
        is_assisted: whether draft tokens come with the prompt.
    """

    copies: int = 1
    is_assisted: bool = False

    @classmethod
    def of(cls, model: nn.Module, kwargs: Mapping[str, Any]) -> Generation:
        """From what a call was given."""
        beams, sequences, *drafts = _asked_for(model, kwargs, "num_beams", "num_return_sequences", *_DRAFTS)
        return cls(max(beams or 1, sequences or 1), any(drafts))


def _asked_for(model: nn.Module, kwargs: Mapping[str, Any], *names: str) -> list[Any]:
    """What a call really asks for by these names: its keywords, else its generation config, else the model's."""
    configs = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]
    sources = [kwargs, *(vars(config) for config in configs if config is not None)]
    return [next((source[name] for source in sources if source.get(name) is not None), None) for name in names]


def refuse_unsupported(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raise `UnsupportedCallError` for what would silently go wrong."""
    names = ("use_cache", "cache_implementation", "assistant_model", *_REFUSED)
    use_cache, kind, assistant, *refused = _asked_for(model, kwargs, *names)
    for name, value in zip(_REFUSED, refused, strict=True):
        if value:
            raise UnsupportedCallError(f"{name}={value!r} cannot be used with pruning: {_REFUSED[name]}")
    if use_cache is False:
        raise UnsupportedCallError("use_cache=False cannot be used with pruning: decisions fall once, in prefill")
    if kind not in (None, "dynamic"):
        raise UnsupportedCallError(
            f"cache_implementation={kind!r} cannot be used with pruning: layers hold different numbers of rows; "
            "leave it at the default"
        )
    if assistant is model:
        raise UnsupportedCallError(
            "assistant_model is the pruned model itself, so its drafts would be pruned as well; "
            "give another model, or prompt_lookup_num_tokens"
        )
    cache = kwargs.get("past_key_values")
    if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length() > 0):
        raise UnsupportedCallError(
            "past_key_values must be an empty DynamicCache with pruning: a new question must not be asked of "
            "rows that were pruned for an old one; pass the whole conversation again"
        )
