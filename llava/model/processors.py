"""The small parts that come with a checkpoint: tokenizer and image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.model import checkpoint
from llava.model.vision import KNOWN_TOWERS, has_vision_tower, tower_name, vision_config_of
from llava.utils import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint: ``tokenizer.json`` as it is, else LLaMA's from ``tokenizer.model``.

    Raises:
        UserError: neither is there, or it cannot be read.
    """
    as_json, as_sentencepiece = (folder / file for file in TOKENIZER_FILES)
    if not as_json.is_file() and not as_sentencepiece.is_file():
        raise UserError(f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES)})")
    try:
        if as_json.is_file():
            return PreTrainedTokenizerFast.from_pretrained(str(folder))
        return _sentencepiece_tokenizer(folder)
    except Exception as error:  # sentencepiece, tokenizers and transformers all raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read the tokenizer in {folder}: {reason}") from error


def _sentencepiece_tokenizer(folder: Path) -> Any:
    settings_file = folder / "tokenizer_config.json"
    settings = checkpoint.read_json(settings_file) if settings_file.is_file() else {}
    tokenizer = LlamaTokenizer.from_pretrained(str(folder), add_bos_token=settings.get("add_bos_token", True))
    # sentencepiece puts its "▁" before any text; transformers' own tokenizer leaves it out where a space is there
    # already. Text after an image often starts with one.
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("^ "), "  ")
    return tokenizer


_PROCESSOR_KEYS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
)


def load_image_processor(folder: Path, config: Any) -> Any:
    """The checkpoint's own CLIP processor, else its tower's, else CLIP's defaults at the tower's size.

    ``None`` for a model without a vision tower.
    """
    if not has_vision_tower(config):
        return None
    settings = _processor_settings(folder)
    name = tower_name(config)
    if settings is None and name is not None and name not in KNOWN_TOWERS:
        settings = _processor_settings(checkpoint.resolve_folder(name))
    side = vision_config_of(config).image_size
    defaults = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    given = {key: value for key, value in (settings or {}).items() if key in _PROCESSOR_KEYS}
    return CLIPImageProcessorPil(**{**defaults, **given})


def _processor_settings(folder: Path) -> dict[str, Any] | None:
    if (folder / "preprocessor_config.json").is_file():
        return checkpoint.read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        return checkpoint.read_json(folder / "processor_config.json").get("image_processor")
    return None
