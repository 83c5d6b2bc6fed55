"""What differs from one model family to the next, and nothing else.

An adapter answers: where is the decoder and its layers, which input ids are visual, and from which layer on may
rows be dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llava.utils import UserError


class UnsupportedModelError(UserError):
    """A model that cannot be pruned. Says why, and what to use instead."""


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        visual_token_keys: config attributes that hold the ids of visual placeholders in `input_ids`.
        first_layer: rows may be dropped at the input of this layer or later.
        note: what a user of this family should know.
    """

    visual_token_keys: tuple[str, ...] = ("image_token_id",)
    first_layer: int = 1
    note: str = ""


# By the `model_type` of the outer config.
FAMILIES: dict[str, Family] = {
    "llava": Family(("image_token_id", "image_token_index")),
    "llava_next": Family(("image_token_id", "image_token_index")),
    # This project's own classes know their visual rows from the splice and hand them over as `visual_mask`.
    "llava_llama": Family(()),
    "llava_mistral": Family(()),
    # Language models alone: the caller brings `inputs_embeds` and says which rows are visual.
    "llama": Family(()),
    "mistral": Family(()),
    "qwen2": Family(()),
}

REFUSED: dict[str, str] = {
    "gemma3": "its image rows attend both ways, through masks of their own; use a LLaVA or Qwen-VL model",
    "mllama": "it reads images through cross-attention, so its prompt has no visual rows to prune; "
    "use a LLaVA or Qwen-VL model",
}


def supported_models() -> list[str]:
    """`model_type`s that `prune` takes."""
    return sorted(FAMILIES)


@dataclass
class Adapter:
    """A model seen through its family.

    Attributes:
        model: the innermost model with `generate`.
        decoder: the module that runs the layers and is called once a forward.
    """

    model: nn.Module
    decoder: nn.Module
    family: Family

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    @property
    def attention_configs(self) -> list:
        """The configs that the layers' attention reads its implementation from, each once."""
        configs = [self.decoder.config, *(layer.self_attn.config for layer in self.layers)]
        return list({id(config): config for config in configs}.values())

    def visual_mask(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Which of `input_ids` (int64 [batch, rows]) are visual, bool; None if ids cannot tell."""
        config = self.model.config
        ids = [getattr(config, key) for key in self.family.visual_token_keys if getattr(config, key, None) is not None]
        if not ids:
            return None
        return torch.isin(input_ids, torch.tensor(sorted(set(ids)), device=input_ids.device))


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a supported model.

    Raises:
        UnsupportedModelError: with the reason and what to use instead.
    """
    inner = _unwrap(model)
    model_type = getattr(inner.config, "model_type", type(inner).__name__)
    if model_type in REFUSED:
        raise UnsupportedModelError(f"{model_type} models cannot be pruned: {REFUSED[model_type]}")
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModelError(
            f"{model_type!r} models cannot be pruned; supported are {', '.join(supported_models())}"
        )
    decoder = inner.get_decoder()
    config = decoder.config
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()) or getattr(
        config, "sliding_window", None
    ):
        raise UnsupportedModelError(
            f"this {model_type} model has sliding-window attention (window {getattr(config, 'sliding_window', None)}), "
            "which counts rows that pruning removes; use a checkpoint with full attention"
        )
    return Adapter(inner, decoder, family)


def _unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside `torch.compile` and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model
