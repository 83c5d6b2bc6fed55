"""Configs of checkpoints in either layout → the configs of our model classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, MistralConfig

from llava.model.llava_arch import LlavaConfig, LlavaLlamaForCausalLM, LlavaMistralConfig, LlavaMistralForCausalLM
from llava.utils import UserError

LLAVA_1_5 = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
}
"""LLaVA-1.5's settings, which a new LLaVA gets where nothing else is said."""

AnyLlavaConfig = LlavaConfig | LlavaMistralConfig

_MODEL_OF_CONFIG: dict[type, Any] = {cls.config_class: cls for cls in (LlavaLlamaForCausalLM, LlavaMistralForCausalLM)}

_HF_MODEL_TYPES = ("llava", "llava_next")
_CONFIG_OF_DECODER: dict[str, type[AnyLlavaConfig]] = {"llama": LlavaConfig, "mistral": LlavaMistralConfig}
# What a file says about itself and not about the model; dtype is chosen when loading.
_NOT_CARRIED = ("architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "auto_map")


def model_class(config: AnyLlavaConfig) -> Any:
    """The causal language model that a config is for."""
    return _MODEL_OF_CONFIG[type(config)]


def is_hf_layout(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of the HF layout; both layouts call themselves ``llava``."""
    return "text_config" in config and not any(key.startswith("mm_") for key in config)


def is_language_model(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a bare language model which can carry a LLaVA."""
    return config.get("model_type") in _CONFIG_OF_DECODER and not any(key.startswith("mm_") for key in config)


def model_config(config: Mapping[str, Any], model_name: str = "") -> AnyLlavaConfig:
    """Our config for the content of a checkpoint's ``config.json``, of either layout.

    Args:
        config: the parsed file.
        model_name: decides between decoders where the config leaves it open (``mistral`` in the name).

    Raises:
        UserError: not a LLaVA of a supported kind, or values that make no model.
    """
    if config.get("quantization_config"):
        raise UserError(
            "the checkpoint is stored quantised; take the full-precision one and load it with load_8bit or load_4bit"
        )
    if is_hf_layout(config):
        cls, values = _from_hf(config)
    else:
        cls, values = _decoder_class(config, model_name), dict(config)
    values = {key: value for key, value in values.items() if key not in (*_NOT_CARRIED, "model_type")}
    try:
        return cls(**values)
    except Exception as error:  # transformers raises many kinds here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(f"config.json does not describe a model: {reason}") from error


def _decoder_class(config: Mapping[str, Any], model_name: str) -> type[AnyLlavaConfig]:
    kind = config.get("model_type")
    if kind == LlavaConfig.model_type:
        return LlavaConfig
    if kind == LlavaMistralConfig.model_type:
        return LlavaMistralConfig
    if kind != "llava" or not any(key.startswith("mm_") for key in config):
        raise UserError(
            f"config.json has model_type {kind!r} and is no LLaVA checkpoint of a supported kind (llava, llava_llama, "
            "llava_mistral; HF layout: llava, llava_next)"
        )
    architectures = config.get("architectures") or [""]
    is_mistral = "Mistral" in architectures[0] or "mistral" in model_name.lower()
    return LlavaMistralConfig if is_mistral else LlavaConfig


def with_decoder_of(base: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A LLaVA config for a base language model: the base's decoder, ``config``'s ``mm_*`` and image keys.

    ``config`` may be the LLaVA config of an adapter or a projector; its own values win, the base fills what it
    leaves out.
    """
    kind = str(base.get("model_type"))
    decoder = kind if kind in _CONFIG_OF_DECODER else {"llava_mistral": "mistral"}.get(kind, "llama")
    return {**base, **config, "model_type": _CONFIG_OF_DECODER[decoder].model_type}


def _from_hf(config: Mapping[str, Any]) -> tuple[type[AnyLlavaConfig], dict[str, Any]]:
    kind = config.get("model_type")
    if kind not in _HF_MODEL_TYPES:
        raise UserError(f"HF checkpoint of model_type {kind!r} is not supported; {', '.join(_HF_MODEL_TYPES)} are")
    text, vision = dict(config["text_config"]), dict(config.get("vision_config") or {})
    decoder = text.get("model_type", LlamaConfig.model_type)
    if decoder not in (LlamaConfig.model_type, MistralConfig.model_type):
        raise UserError(f"the checkpoint's decoder is {decoder!r}; llama and mistral are supported")
    if not vision:
        raise UserError("config.json has a text_config but no vision_config")
    if config.get("projector_hidden_act", "gelu") != "gelu" or not config.get("multimodal_projector_bias", True):
        raise UserError("the checkpoint's projector is not linear, GELU, linear with biases")
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise UserError(f"vision_feature_layer is {layer!r}; one layer (an int) is supported")
    strategy = config.get("vision_feature_select_strategy", "default")
    features = {"default": "patch", "full": "cls_patch"}
    if strategy not in features:
        raise UserError(f"vision_feature_select_strategy is {strategy!r}; known are default and full")
    values = {
        **text,
        "tie_word_embeddings": config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        "vision_config": {key: value for key, value in vision.items() if key not in _NOT_CARRIED},
        "mm_hidden_size": vision.get("hidden_size"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": features[strategy],
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        # The weights were trained on padded squares; the layout does not record it.
        "image_aspect_ratio": "pad",
    }
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "conv_mode"):
        if text.get(key) is None and config.get(key) is not None:
            values[key] = config[key]
    if kind == "llava_next":
        # Heights come first in this layout, widths in the original.
        pinpoints = config.get("image_grid_pinpoints") or [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        values |= {
            "image_aspect_ratio": "anyres",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": [[width, height] for height, width in pinpoints],
        }
    return _CONFIG_OF_DECODER[decoder], values
