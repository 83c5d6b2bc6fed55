"""Names of weights: any layout's → our modules', which are transformers' own, and back to the original ones.

Original checkpoints say ``model.mm_projector.0``, the HF layout ``multi_modal_projector.linear_1`` on disk and
``model.multi_modal_projector.linear_1`` in newer files and in memory. Pure functions on strings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

TOWER = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."
_DECODER = "model.language_model."
_ORIGINAL_TOWER = "model.vision_tower.vision_tower.vision_model."
_ORIGINAL_PROJECTOR = "model.mm_projector."

# How a name of any layout starts, and how its module's does; the first that fits.
_STARTS = (
    (re.compile(r"(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?"), TOWER),
    (re.compile(r"(model\.)?(multi_modal_projector|mm_projector)\."), PROJECTOR),
    (re.compile(r"(model\.)?image_newline$"), "model.image_newline"),
    (re.compile(r"(language_model\.)?lm_head\."), "lm_head."),
    (re.compile(r"(language_model\.model|model\.language_model|model)\."), _DECODER),
)
_OLD_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|embeddings\.position_ids)$")
_CLIP_TOWER = re.compile(r"(vision_model\.|(?=embeddings\.|pre_layrnorm\.|encoder\.|post_layernorm\.))")


def module_name(key: str) -> str:
    """Our name of a weight (or module) of any layout, our own included; a name that fits none comes back as it is."""
    for start, ours in _STARTS:
        if found := start.match(key):
            rest = key[found.end() :]
            if ours == PROJECTOR:  # the original counts activations: 0, 2, …
                rest = re.sub(r"^\d+", lambda number: f"linear_{int(number[0]) // 2 + 1}", rest)
            return ours + rest
    return key


def original_name(name: str) -> str:
    """The name in original checkpoints of one of our weights (or modules)."""
    if name.startswith(PROJECTOR):
        rest = name.removeprefix(PROJECTOR)
        return _ORIGINAL_PROJECTOR + re.sub(r"^linear_(\d+)", lambda number: str(2 * int(number[1]) - 2), rest)
    if name.startswith(TOWER):
        return _ORIGINAL_TOWER + name.removeprefix(TOWER)
    return "model." + name.removeprefix(_DECODER) if name.startswith(_DECODER) else name


def from_lora(key: str) -> str:
    """Our name of a weight in ``non_lora_trainables.bin`` or an adapter, which PEFT's wrappers prefixed."""
    key = key.removeprefix("base_model.")
    return module_name(key.removeprefix("model.") if key.startswith(("model.model.", "model.lm_head.")) else key)


def module_names(weights: Mapping[str, T]) -> dict[str, T]:
    """A checkpoint's weights under our names, without tables that old checkpoints stored and modules now compute."""
    return {module_name(key): weight for key, weight in weights.items() if not _OLD_BUFFERS.search(key)}


def tower_names(weights: Mapping[str, T]) -> dict[str, T]:
    """The vision tower's weights of a CLIP checkpoint under our names; its text side and projections are left out."""
    return module_names({TOWER + key: weight for key, weight in weights.items() if _CLIP_TOWER.match(key)})
