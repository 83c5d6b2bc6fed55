"""Tiny random LLaVA models and the checkpoint folders that hold them, in every layout users have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, MistralConfig, PreTrainedTokenizerFast

from llava.model.configs import model_class
from llava.model.key_mapping import original_name
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig

VOCAB = 64
TILE = 28  # pixels a side, 2 x 2 patches
PATCHES_PER_SIDE = 2
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": 14,
    "projection_dim": 8,
    "hidden_act": "quick_gelu",
}
DECODER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAVA = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 16,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
}
ANYRES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
}


def tiny_config(mistral: bool = False, tower: bool = True, **overrides: Any) -> Any:
    values = {**DECODER, **LLAVA, **({"vision_config": VISION} if tower else {}), **overrides}
    if mistral:
        return LlavaMistralConfig(**{"sliding_window": None, **values})
    return LlavaConfig(**values)


def tiny_model(config: Any = None, seed: int = 0) -> LlavaLlamaForCausalLM:
    """A model whose every weight is random, biases and norms included, so that a lost one shows."""
    config = config if config is not None else tiny_config()
    model = model_class(config)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith("norm.weight") or re.search(r"norm\d?\.weight$", name)
            parameter.copy_(1 + 0.1 * noise if is_norm else noise * 0.3)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "USER:", "ASSISTANT:", "what", "is", "this", "red", "blue", "a", "cat"]
    vocab = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def original_config(model: Any, **overrides: Any) -> dict[str, Any]:
    """``config.json`` as original checkpoints have it, with the tower's architecture inside."""
    is_mistral = isinstance(model.config, LlavaMistralConfig)
    kept = {key: getattr(model.config, key) for key in (*DECODER, *LLAVA)}
    kept |= {key: getattr(model.config, key) for key in ANYRES if hasattr(model.config, key)}
    return {
        "architectures": ["LlavaMistralForCausalLM" if is_mistral else "LlavaLlamaForCausalLM"],
        "model_type": "llava_mistral" if is_mistral else "llava_llama",
        "rope_theta": 10000.0,
        "torch_dtype": "float16",
        "vision_config": VISION,
        **kept,
        **overrides,
    }


def original_weights(model: Any) -> dict[str, torch.Tensor]:
    """The model's weights under the names of original checkpoints."""
    return {original_name(key): weight for key, weight in model.state_dict().items()}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_weights(folder: Path, weights: dict[str, torch.Tensor], form: str = "safetensors", shards: int = 1) -> None:
    """Weights as ``safetensors`` or ``bin``, in one file or in shards with an index."""
    suffix, stem = (".safetensors", "model") if form == "safetensors" else (".bin", "pytorch_model")

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        copies = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
        save_file(copies, path) if form == "safetensors" else torch.save(copies, path)

    if shards == 1:
        save(weights, folder / (stem + suffix))
        return
    names = list(weights)
    weight_map = {}
    for index in range(shards):
        file = f"{stem}-{index + 1:05d}-of-{shards:05d}{suffix}"
        part = names[index::shards]
        save({key: weights[key] for key in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / f"{stem}{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_original(
    folder: Path, model: Any, form: str = "safetensors", shards: int = 1, **config_overrides: Any
) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "config.json", original_config(model, **config_overrides))
    write_weights(folder, original_weights(model), form, shards)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_tower(folder: Path, model: Any) -> Path:
    """The model's tower alone, as a CLIP checkpoint, with the text side's weights that CLIP files also hold."""
    folder.mkdir(parents=True)
    prefix = "model.vision_tower.vision_tower."
    weights = {k.removeprefix(prefix): v for k, v in original_weights(model).items() if k.startswith(prefix)}
    weights["text_model.final_layer_norm.weight"] = torch.ones(4)
    weights["logit_scale"] = torch.ones(())
    weights["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": VISION, "text_config": {}})
    write_json(folder / "preprocessor_config.json", {"size": TILE, "crop_size": TILE, "image_mean": [0.5, 0.4, 0.3]})
    write_weights(folder, weights, "bin")
    return folder


def write_hf(folder: Path, model: Any, extra_vocab: int = 0, newer: bool = False) -> Path:
    """The HF layout, written out by hand from its published description; vocabulary padded by ``extra_vocab``."""
    folder.mkdir(parents=True)
    config = model.config
    anyres = getattr(config, "image_aspect_ratio", None) == "anyres"
    is_mistral = isinstance(config, LlavaMistralConfig)
    decoder = MistralConfig() if is_mistral else LlamaConfig()
    known = {key for key in decoder.to_dict() if key not in ("architectures", "transformers_version", "dtype")}
    text = {key: value for key, value in config.to_dict().items() if key in known}
    text["model_type"] = decoder.model_type
    text["vocab_size"] += extra_vocab
    if is_mistral:
        text["sliding_window"] = None
    content = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava_next" if anyres else "llava",
        "image_token_index": config.vocab_size,
        "text_config": text,
        "vision_config": config.vision_config,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.mm_vision_select_layer,
        "vision_feature_select_strategy": "default",
    }
    if anyres:
        content["image_grid_pinpoints"] = [[h, w] for w, h in config.image_grid_pinpoints]
    write_json(folder / "config.json", content)
    write_json(
        folder / "preprocessor_config.json",
        {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}},
    )
    write_weights(folder, {_hf_name(k, newer): _pad(k, v, extra_vocab) for k, v in original_weights(model).items()})
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _pad(key: str, weight: torch.Tensor, rows: int) -> torch.Tensor:
    if rows and key in ("model.embed_tokens.weight", "lm_head.weight"):
        return torch.cat([weight, torch.zeros(rows, weight.shape[1])])
    return weight


def _hf_name(key: str, newer: bool) -> str:
    """Independent of ``llava.model.key_mapping``: the published names, one rule a line."""
    if key.startswith("model.vision_tower.vision_tower.vision_model."):
        rest = key.split("vision_model.", 1)[1]
        return f"model.vision_tower.{rest}" if newer else f"vision_tower.vision_model.{rest}"
    root = "model." if newer else ""
    if key.startswith("model.mm_projector."):
        _, _, index, kind = key.split(".")
        return f"{root}multi_modal_projector.linear_{ {'0': 1, '2': 2}[index] }.{kind}"
    if key == "model.image_newline":
        return f"{root}image_newline"
    if key == "lm_head.weight":
        return key if newer else "language_model.lm_head.weight"
    rest = key.removeprefix("model.")
    return f"model.language_model.{rest}" if newer else f"language_model.model.{rest}"
