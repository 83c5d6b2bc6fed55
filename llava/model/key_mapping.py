"""Names of weights: original LLaVA ↔ Hugging Face layout, pure functions on strings.

Original names are the ones our modules have. The HF layout has two forms: as published on disk
(``language_model.model.…``) and as newer transformers hold it in memory (``model.language_model.…``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

TOWER_PREFIX = "model.vision_tower.vision_tower."

_OLD_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids)$")

# (HF on disk, original), prefix by prefix; every name matches exactly one of them.
_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", TOWER_PREFIX),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("image_newline", "model.image_newline"),
)
_NEWER_HF = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)
_TOWER_ONLY_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")


def is_old_buffer(key: str) -> bool:
    """Whether ``key`` is a table that old checkpoints stored and modules now compute: ignored while loading."""
    return _OLD_BUFFERS.search(key) is not None


def from_hf(key: str) -> str:
    """Original name of a weight in HF layout (either form); a name that fits neither comes back as it is."""
    for newer, on_disk in _NEWER_HF:
        if key.startswith(newer):
            key = on_disk + key.removeprefix(newer)
            break
    for hf, original in _PREFIXES:
        if key.startswith(hf):
            rest = key.removeprefix(hf)
            return original + (_with_vision_model(rest) if original == TOWER_PREFIX else rest)
    return key


def to_hf(key: str) -> str:
    """On-disk HF name of an original weight; the inverse of :func:`from_hf`."""
    # The longest prefix first: "model." alone would swallow the tower and the projector.
    for hf, original in sorted(_PREFIXES, key=lambda pair: -len(pair[1])):
        if key.startswith(original):
            return hf + key.removeprefix(original)
    return key


def from_clip(key: str) -> str | None:
    """Original name of a weight of a CLIP checkpoint, or ``None`` for CLIP's text side and projections."""
    if key.startswith("vision_model.") or key.startswith(_TOWER_ONLY_PARTS):
        return TOWER_PREFIX + _with_vision_model(key)
    return None


def from_lora_extras(key: str) -> str:
    """Original name of a weight in ``non_lora_trainables.bin``, which PEFT's wrappers prefixed."""
    key = key.removeprefix("base_model.")
    return key.removeprefix("model.") if key.startswith(("model.model.", "model.lm_head.")) else key


def original_names(weights: Mapping[str, T], is_hf: bool) -> dict[str, T]:
    """A checkpoint's weights under original names, without old buffers."""
    named = ((from_hf(key) if is_hf else key, weight) for key, weight in weights.items())
    return {key: weight for key, weight in named if not is_old_buffer(key)}


def tower_names(weights: Mapping[str, T]) -> dict[str, T]:
    """The vision tower's weights of a CLIP checkpoint, under original names, without old buffers."""
    named = ((from_clip(key), weight) for key, weight in weights.items())
    return {key: weight for key, weight in named if key is not None and not is_old_buffer(key)}


def _with_vision_model(key: str) -> str:
    return key if key.startswith("vision_model.") else "vision_model." + key
