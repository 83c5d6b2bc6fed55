"""Which vision tower a checkpoint's config asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.utils import UserError

_VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {**_VIT_L, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_VIT_L, "image_size": 224},
}
"""Architectures of the towers that published LLaVA checkpoints name, so that no hub is asked for them."""


def tower_name(config: Any) -> str | None:
    """The hub id or folder of the tower that ``config`` names, if any."""
    return getattr(config, "mm_vision_tower", None) or None


def has_vision_tower(config: Any) -> bool:
    """Whether a model of this config has a vision tower (and with it a projector)."""
    return bool(tower_name(config) or getattr(config, "vision_config", None))


def vision_config_of(config: Any) -> CLIPVisionConfig:
    """Architecture of the tower: ``config.vision_config``, else that of the tower ``mm_vision_tower`` names.

    Raises:
        UserError: the tower is not CLIP, or its config cannot be read.
    """
    given = getattr(config, "vision_config", None)
    if isinstance(given, CLIPVisionConfig):
        return given
    if given:
        return _clip_config(given)
    name = tower_name(config)
    if name is None:
        raise UserError("the config names no vision tower (neither vision_config nor mm_vision_tower)")
    if name in KNOWN_TOWERS and not Path(name).is_dir():
        return CLIPVisionConfig(**KNOWN_TOWERS[name])
    try:
        return _clip_config(CLIPVisionConfig.get_config_dict(name)[0])
    except (OSError, KeyError) as error:
        raise UserError(
            f"cannot read the config of vision tower {name!r}; give a CLIP folder that exists here as "
            "mm_vision_tower in config.json, or connect to the hub"
        ) from error


def _clip_config(values: dict[str, Any]) -> CLIPVisionConfig:
    """From the config of a tower, or of a whole CLIP with its text side."""
    kind = values.get("model_type", CLIPVisionConfig.model_type)
    if kind not in (CLIPVisionConfig.model_type, "clip"):
        raise UserError(f"vision tower of type {kind!r} is not supported; only CLIP towers are")
    vision = values.get("vision_config", values) if kind == "clip" else values
    return CLIPVisionConfig(**{key: value for key, value in vision.items() if key not in ("model_type", "dtype")})


def build_vision_tower(config: Any) -> CLIPVisionTower:
    """The vision tower of a model config; weights come later, with the model's own."""
    return CLIPVisionTower(
        vision_config_of(config),
        select_layer=getattr(config, "mm_vision_select_layer", -2),
        select_feature=getattr(config, "mm_vision_select_feature", "patch"),
        name=tower_name(config),
    )
