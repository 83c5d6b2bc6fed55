"""``load_pretrained_model``: any LLaVA checkpoint → tokenizer, model, image processor, context length.

All layouts end in the same classes, with the modules of transformers' own LLaVA, so that every tool treats all
checkpoints alike. The order is: look at the arguments, the config, the tokenizer and the names and shapes of the
weights; only then read weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.errors import missing_extra
from llava.model import checkpoint, key_mapping
from llava.model.checkpoint import Weights
from llava.model.configs import (
    LLAVA_1_5,
    AnyLlavaConfig,
    is_hf_layout,
    is_language_model,
    model_class,
    model_config,
    with_decoder_of,
)
from llava.model.llava_arch import SAMPLING_KEYS
from llava.model.placement import (
    Placement,
    attention_for,
    check_device,
    default_device,
    parse_dtype,
    placement_for,
    quantization_for,
)
from llava.model.processors import TOKENIZER_FILES, load_image_processor, load_tokenizer
from llava.model.vision import build_projector, has_vision_tower, tower_name, vision_config_of
from llava.utils import UserError

__all__ = [
    "check_device",
    "context_length",
    "default_device",
    "load_for_training",
    "load_image_processor",
    "load_pretrained_model",
    "load_tokenizer",
    "parse_dtype",
]

_DEFAULT_CONTEXT = 2048
# Below this many bytes loading takes a moment and a progress bar is noise.
_PROGRESS_FROM = 1 << 28


def load_pretrained_model(
    model_path: str | Path,
    model_base: str | Path | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    use_flash_attn: bool = False,
    offload_folder: str | Path | None = None,
    max_memory: dict[Any, Any] | None = None,
) -> tuple[Any, Any, Any, int]:
    """Load a LLaVA checkpoint of the original or the Hugging Face layout.

    Args:
        model_path: a folder, or a hub id.
        model_base: the base language model, where ``model_path`` holds only a LoRA adapter or a projector.
        model_name: the checkpoint's name (``lora`` and ``mistral`` in it mean something); absent, from the path.
        load_8bit, load_4bit: quantise while loading, with bitsandbytes (4 bit: nf4, double quantisation, fp16
            compute); tower, projector and ``lm_head`` stay as they are.
        device_map: as in transformers (``"auto"``, or a dict of module names: ``model.language_model.layers.0``, …);
            wins over ``device``.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; absent, the first of cuda, mps, cpu that is there.
        dtype: of the weights in memory, whatever the files hold; absent, float32 on CPU and float16 elsewhere.
        attn_implementation: ``sdpa`` (default), ``eager`` or ``flash_attention_2``.
        use_flash_attn: the same as ``attn_implementation="flash_attention_2"``.
        offload_folder, max_memory: as in transformers, for a ``device_map`` that offloads.

    Returns:
        tokenizer, model (in eval mode), CLIP image processor, context length in rows.

    Raises:
        UserError: one line that says what is wrong; before any weights are read.
    """
    placement = placement_for(device, device_map, dtype)
    attention = attention_for(attn_implementation, use_flash_attn, placement)
    quantization = quantization_for(load_8bit, load_4bit)
    name = model_name or Path(str(model_path).rstrip("/")).name
    source = _open(model_path, model_base, name)
    _add_tower(source)
    offload = {"offload_folder": None if offload_folder is None else str(offload_folder), "max_memory": max_memory}
    parts = _build(source, str(model_path), placement, attention, quantization, offload)
    parts[1].eval()
    return parts


def load_for_training(
    model_path: str | Path,
    settings: Mapping[str, Any],
    projector: Path | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    placed: bool = True,
) -> tuple[Any, Any, Any, int]:
    """A LLaVA to train: a checkpoint, or a language model that gets a tower and a new projector.

    Args:
        model_path: a whole LLaVA checkpoint, or a LLaMA or Mistral language model.
        settings: keys of a LLaVA config (``mm_vision_tower``, ``mm_projector_type``, …) that go before the checkpoint's
            own; a language model gets LLaVA-1.5's where they say nothing.
        projector: weights of a projector (a ``mm_projector.bin`` or ``.safetensors``) that go before the checkpoint's.
        load_8bit, load_4bit, device, dtype, attn_implementation: see :func:`load_pretrained_model`.
        placed: False: weights are put nowhere, where something else (DeepSpeed's ZeRO-3) distributes them.

    Returns:
        tokenizer, model (in train mode), CLIP image processor, context length in rows.

    Raises:
        UserError: one line that says what is wrong; before any weights are read.
    """
    placement = placement_for(device, None, dtype)
    if not placed:
        placement = replace(placement, device_map=None)
    attention = attention_for(attn_implementation, False, placement)
    quantization = quantization_for(load_8bit, load_4bit, placement.dtype)
    folder = checkpoint.resolve_folder(model_path)
    raw = checkpoint.read_json(folder / "config.json")
    if is_language_model(raw):
        config = model_config(with_decoder_of(raw, {**LLAVA_1_5, **settings}))
        if not has_vision_tower(config):
            raise UserError(f"{model_path} is a language model; name the vision tower to put in front (--vision_tower)")
        checkpoint.fetch_weights(model_path, folder)
        source = _Source(folder, config, key_mapping.module_names(checkpoint.open_weights(folder)), folder)
    else:
        source = _open(model_path, None, Path(str(model_path).rstrip("/")).name)
        _settle(source, settings, str(model_path))
    _add_tower(source)
    if projector is not None:
        source.weights |= _projector(projector)
    elif not _any_below(source.weights, key_mapping.PROJECTOR):
        if getattr(source.config, "mm_hidden_size", None) is None:
            source.config.mm_hidden_size = vision_config_of(source.config).hidden_size
        fresh = build_projector(source.config).state_dict()
        source.weights |= {key_mapping.PROJECTOR + key: weight for key, weight in fresh.items()}
    parts = _build(source, str(model_path), placement, attention, quantization, {})
    parts[1].train()
    return parts


def _build(
    source: _Source,
    model_path: str,
    placement: Placement,
    attention: str,
    quantization: Any,
    offload: Mapping[str, Any],
) -> tuple[Any, Any, Any, int]:
    """What an understood checkpoint holds: first the small parts and all checks, then the weights."""
    tokenizer = load_tokenizer(source.tokenizer_folder)
    image_processor = load_image_processor(source.folder, source.config)

    cls = model_class(source.config)
    with torch.device("meta"):
        skeleton = cls(source.config)
    tied = frozenset({"lm_head.weight"} if source.config.tie_word_embeddings else ())
    checkpoint.check_weights(skeleton, source.weights, tied, model_path)
    if source.adapter_folder is not None:
        _check_adapter(skeleton, source.adapter_folder)
    with _progress(checkpoint.size_in_bytes(source.weights) >= _PROGRESS_FROM):
        model: Any = cls.from_pretrained(
            None,
            config=source.config,
            state_dict=source.weights,
            dtype=placement.dtype,
            device_map=placement.device_map,
            quantization_config=quantization,
            attn_implementation=attention,
            **offload,
        )
    # Read by the pruning engine (the published names decide layer 0's rule) and written into saved configs.
    model.config._name_or_path = model_path
    model.name_or_path = model_path
    _set_generation_config(model, source.folder, tokenizer)
    if source.adapter_folder is not None:
        model = _merge_adapter(model, source.adapter_folder)
    _add_image_tokens(model, tokenizer)
    tower = model.get_vision_tower()
    if tower is not None:
        tower.image_processor = image_processor
    return tokenizer, model, image_processor, context_length(model.config)


def context_length(config: Any) -> int:
    """How many rows (text and visual) a prompt and its answer may have together."""
    for key in ("max_sequence_length", "max_position_embeddings"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return _DEFAULT_CONTEXT


# --- what the checkpoint is ---


@dataclass
class _Source:
    """A checkpoint that was understood: what to build and where everything comes from."""

    folder: Path
    config: AnyLlavaConfig
    weights: Weights
    tokenizer_folder: Path
    adapter_folder: Path | None = None


def _open(model_path: str | Path, model_base: str | Path | None, name: str) -> _Source:
    folder = checkpoint.resolve_folder(model_path)
    model_base = checkpoint.base_of(folder, model_base)
    raw = checkpoint.read_json(folder / "config.json")
    is_adapter = (folder / "adapter_config.json").is_file()
    if model_base is None:
        if is_adapter or ("lora" in name.lower() and not _may_have_weights(model_path, folder)):
            raise UserError(f"{model_path} is a LoRA adapter; give its base model as model_base (--model-base)")
        config = model_config(raw, name)
        checkpoint.fetch_weights(model_path, folder)
        weights = key_mapping.module_names(checkpoint.open_weights(folder))
        if not _any_below(weights, key_mapping.PROJECTOR) and (folder / "mm_projector.bin").is_file():
            weights |= _projector(folder / "mm_projector.bin")
        return _Source(folder, config, weights, tokenizer_folder=folder)
    return _open_on_base(model_path, folder, raw, model_base, name, "lora" in name.lower() or is_adapter)


def _settle(source: _Source, settings: Mapping[str, Any], model_path: str) -> None:
    """Let settings go before those of a LLaVA checkpoint."""
    config, tower = source.config, settings.get("mm_vision_tower")
    if tower is not None and tower != tower_name(config):
        if _any_below(source.weights, key_mapping.TOWER):
            raise UserError(f"{model_path} has its vision tower inside; leave out --vision_tower {tower}")
        config.vision_config = None  # the other tower's
    for key, value in settings.items():
        setattr(config, key, value)


def _may_have_weights(model_path: str | Path, folder: Path) -> bool:
    return checkpoint.has_weights(folder) or not Path(model_path).expanduser().is_dir()


def _open_on_base(
    model_path: str | Path,
    folder: Path,
    raw: dict[str, Any],
    model_base: str | Path,
    name: str,
    is_adapter: bool,
) -> _Source:
    base_folder = checkpoint.resolve_folder(model_base)
    base_raw = checkpoint.read_json(base_folder / "config.json")
    base_values = model_config(base_raw).to_dict() if is_hf_layout(base_raw) else base_raw
    config = model_config(with_decoder_of(base_values, raw), name)
    checkpoint.fetch_weights(model_path, folder)
    checkpoint.fetch_weights(model_base, base_folder)
    extras_file = folder / ("non_lora_trainables.bin" if is_adapter else "mm_projector.bin")
    if not extras_file.is_file():
        raise UserError(
            f"{extras_file} is missing; with a base model, "
            + (
                "a LoRA folder holds adapter_config.json, adapter_model.* and this file"
                if is_adapter
                else "the folder holds a projector (or, with 'lora' in its name, an adapter)"
            )
        )
    if is_adapter and not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder / 'adapter_config.json'} is missing; the LoRA adapter is incomplete")
    weights = key_mapping.module_names(checkpoint.open_weights(base_folder))
    if is_adapter:
        extras = checkpoint.open_file(extras_file)
        weights |= {key_mapping.from_lora(key): weight for key, weight in extras.items()}
    else:
        weights |= _projector(extras_file)
    if "lm_head.weight" in weights:
        # Fine-tuning may have added tokens that the base's config does not count.
        config.vocab_size = checkpoint.shape_of(weights["lm_head.weight"])[0]
    has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES)
    tokenizer_folder = folder if is_adapter and has_tokenizer else base_folder
    return _Source(folder, config, weights, tokenizer_folder, folder if is_adapter else None)


def _projector(file: Path) -> Weights:
    """``mm_projector.bin``, whose keys may carry the wrappers of distributed training in front."""
    found = {}
    for key, weight in checkpoint.open_file(file).items():
        start = max(key.find("mm_projector."), key.find("image_newline"))
        if start < 0:
            raise UserError(f"{file} holds {key}, which is no part of a projector")
        found[key_mapping.module_name(key[start:])] = weight
    return found


def _any_below(weights: Weights, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in weights)


def _add_tower(source: _Source) -> None:
    """Settle the tower's architecture, and take its weights from outside where the checkpoint has none."""
    config = source.config
    if not has_vision_tower(config):
        return
    vision = vision_config_of(config)
    # With this a saved copy of the model needs neither the hub nor the tower's folder.
    config.vision_config = {**vision.to_diff_dict(), "model_type": vision.model_type}
    name = tower_name(config)
    if _any_below(source.weights, key_mapping.TOWER) or name is None:
        return
    try:
        folder = checkpoint.resolve_folder(name)
        checkpoint.fetch_weights(name, folder)
    except UserError as error:
        raise UserError(
            f"the checkpoint's vision tower is not inside it and could not be found: {error}; "
            "mm_vision_tower in config.json may name a downloaded folder"
        ) from error
    source.weights |= key_mapping.tower_names(checkpoint.open_weights(folder))


# --- after the weights ---


@contextmanager
def _progress(show: bool) -> Iterator[None]:
    """transformers' bar over the weights, only where it is worth one."""
    was_shown = logging.is_progress_bar_enabled()
    if not show:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def _set_generation_config(model: Any, folder: Path, tokenizer: Any) -> None:
    if (folder / "generation_config.json").is_file():
        values = checkpoint.read_json(folder / "generation_config.json")
        # Published files carry sampling settings without do_sample, which transformers warns of and refuses to save;
        # a limit on prompt and answer together, where max_new_tokens decides.
        if not values.get("do_sample"):
            model.sampling_settings = {key: values.pop(key) for key in SAMPLING_KEYS if key in values}
        model.generation_config = GenerationConfig.from_dict({**values, "max_length": None})
    config = model.generation_config
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.eos_token_id


def _merge_adapter(model: Any, folder: Path) -> Any:
    """The model with its LoRA adapter merged in."""
    try:
        from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    except ImportError as error:
        raise missing_extra("peft", "a LoRA adapter", error) from error
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(f"the adapter in {folder} cannot be merged into offloaded layers; use another device_map")
    weights = {_PEFT + name: weight for name, weight in _adapter_weights(folder).items()}
    config = PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # the base is here; PEFT would warn that it has another name
    if isinstance(config.target_modules, str):  # a pattern for original names; the weights say what it matched
        config.target_modules = sorted({name.removeprefix(_PEFT).split(".lora_")[0] for name in weights})
    elif config.target_modules is not None:
        config.target_modules = sorted(map(key_mapping.module_name, config.target_modules))
    if not any("vision_tower" in name for name in weights) and config.exclude_modules is None:
        # Target names such as q_proj also fit CLIP's layers, which LLaVA's adapters never cover.
        config.exclude_modules = r".*\b(vision_tower|multi_modal_projector)\b.*"
    wrapped = get_peft_model(model, config)
    wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)  # those are no part of an adapter
    if lacking := sorted(wanted.keys() - weights.keys()):
        named = [_PEFT + key_mapping.original_name(name.removeprefix(_PEFT)) for name in lacking]
        raise UserError(f"the adapter in {folder} lacks {checkpoint.name_some(named)}")
    set_peft_model_state_dict(wrapped, {name: weight[...] for name, weight in weights.items()})
    return wrapped.merge_and_unload()


def _check_adapter(skeleton: torch.nn.Module, folder: Path) -> None:
    """Every weight of the adapter has a layer of the model to go to."""
    layers = {name for name, _ in skeleton.named_modules()}
    strangers = [
        _PEFT + key_mapping.original_name(name)
        for name in _adapter_weights(folder)
        if name.split(".lora_")[0] not in layers and ".lora_" in name
    ]
    if strangers:
        raise UserError(f"the adapter in {folder} is not for this base model: {checkpoint.name_some(strangers)}")


_PEFT = "base_model.model."  # in front of every name in an adapter


def _adapter_weights(folder: Path) -> Weights:
    """An adapter's weights under the names of the modules that they change."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return {key_mapping.from_lora(key): weight for key, weight in checkpoint.open_file(folder / name).items()}
    raise UserError(f"{folder} has no adapter_model.safetensors or adapter_model.bin")


def _add_image_tokens(model: Any, tokenizer: Any) -> None:
    """Give tokenizer and embedding the extra tokens that the config asks for, where the checkpoint lacks them."""
    extra = []
    if getattr(model.config, "mm_use_im_patch_token", False):
        extra.append(DEFAULT_IMAGE_PATCH_TOKEN)
    if getattr(model.config, "mm_use_im_start_end", False):
        extra += [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
    if extra:
        tokenizer.add_tokens(extra, special_tokens=True)
    rows = model.get_input_embeddings().weight.shape[0]
    added = len(tokenizer) - rows
    if added <= 0 or not extra:
        return
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = table.weight.data
        weight[rows:] = weight[:rows].float().mean(dim=0).to(weight.dtype)
