"""Tiny random models of every supported family, built from their configs, and inputs for them. No downloads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

LAYERS = 8
HIDDEN = 64
VOCAB = 128
IMAGE, VIDEO, START, END, PAD = 100, 101, 102, 103, 0
TEXT_IDS = (10, 90)

TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    # Large enough that a row left out shows in the logits.
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
LLAMA = dict(TEXT, model_type="llama")
MISTRAL = dict(TEXT, model_type="mistral", sliding_window=None)
QWEN2 = dict(TEXT, model_type="qwen2")
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
CLIP = dict(ENCODER, model_type="clip_vision_model")
SIGLIP = dict(ENCODER, model_type="siglip_vision_model", vision_use_head=False)
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass
class Medium:
    """An image or a video: the ids that stand for it in the prompt and what the model gets of it."""

    ids: list[int]
    tensors: dict[str, torch.Tensor]


Prompt = Sequence[int | str]
"""Pieces of a prompt: a number of text tokens, `"image"` or `"video"`."""


@dataclass(frozen=True)
class TinyFamily:
    """One family as tests see it.

    Attributes:
        settings: of the outer config.
        medium: `(kind, number) → Medium`; images of different numbers look different, and where the family allows
            it they have different sizes.
        has_video: whether the family takes videos, through an input of their own or as frames among the images.
        first_layer: rows may leave at the input of this layer.
    """

    name: str
    settings: dict[str, Any]
    medium: Callable[[str, int], Medium]
    has_video: bool = False
    first_layer: int = 0
    joins: Callable[[list[list[Medium]]], dict[str, torch.Tensor]] | None = None

    def build(self) -> nn.Module:
        """A model with weights of its own, the same at every call."""
        settings = dict(self.settings)
        torch.manual_seed(7)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD
        return model

    def inputs(self, *prompts: Prompt, extra_padding: int = 0) -> dict[str, torch.Tensor]:
        """The prompts as a left-padded batch."""
        rows: list[list[int]] = []
        media: list[list[Medium]] = []
        number = 0
        for prompt in prompts:
            ids, own = [], []
            generator = torch.Generator().manual_seed(len(rows) + 1)
            for piece in prompt:
                if isinstance(piece, int):
                    ids += torch.randint(*TEXT_IDS, (piece,), generator=generator).tolist()
                else:
                    medium = self.medium(piece, number)
                    number += 1
                    ids += medium.ids
                    own.append(medium)
            rows.append(ids)
            media.append(own)
        width = max(map(len, rows)) + extra_padding
        input_ids = torch.tensor([[PAD] * (width - len(ids)) + ids for ids in rows])
        lengths = torch.tensor([[len(ids)] for ids in rows])
        inputs = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(width) >= width - lengths).long(),
        }
        inputs |= (self.joins or _joined)(media)
        if "qwen" in self.name:
            inputs["mm_token_type_ids"] = (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()
        return inputs


def _joined(media: list[list[Medium]]) -> dict[str, torch.Tensor]:
    """All images of the batch one behind the other."""
    joined: dict[str, list[torch.Tensor]] = {}
    for medium in (medium for own in media for medium in own):
        for key, tensor in medium.tensors.items():
            joined.setdefault(key, []).append(tensor)
    return {key: torch.cat(parts) for key, parts in joined.items()}


def _tiles_a_sample(media: list[list[Medium]]) -> dict[str, torch.Tensor]:
    """`[batch, most tiles of a sample, ...]`, missing tiles zero."""
    most = max((sum(len(medium.tensors["pixel_values"]) for medium in own) for own in media), default=0)
    if most == 0:
        return {}
    shape = next(medium.tensors["pixel_values"] for own in media for medium in own).shape[1:]
    pixels = torch.zeros(len(media), most, *shape)
    for sample, own in enumerate(media):
        tiles = torch.cat([medium.tensors["pixel_values"] for medium in own]) if own else torch.zeros(0, *shape)
        pixels[sample, : len(tiles)] = tiles
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(len(media), most, *shape[1:], dtype=torch.long)}


def _pixels(number: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + number))


def _llava_image(kind: str, number: int) -> Medium:
    return Medium([IMAGE] * 16, {"pixel_values": _pixels(number, 1, 3, 28, 28)})


def _anyres_image(kind: str, number: int) -> Medium:
    """Tile map after its padding is removed, a newline a row, behind the 16 of the base image."""
    height, width = ((28, 56), (40, 50))[number % 2]
    # 28 x 56: two tiles, 4 x 8 patches. 40 x 50: four tiles, an 8 x 8 map of which round(8 * 40 / 50) = 6 rows stay.
    rows, columns, tiles = ((4, 8, 2), (6, 8, 4))[number % 2]
    pixels = torch.zeros(1, 5, 3, 28, 28)
    pixels[:, : tiles + 1] = _pixels(number, 1, tiles + 1, 3, 28, 28)
    return Medium(
        [IMAGE] * (16 + rows * (columns + 1)),
        {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])},
    )


def _onevision_medium(kind: str, number: int) -> Medium:
    if kind == "image":
        return _anyres_image(kind, number)
    # Three frames, each 4 x 4 patches pooled to 2 x 2, and one newline.
    return Medium([VIDEO] * (3 * 4 + 1), {"pixel_values_videos": _pixels(number, 1, 3, 3, 28, 28)})


def _frames(number: int) -> Medium:
    """A video as its processor hands it over: three frames, pictures like any other, and a word before each."""
    ids = [part for time in range(3) for part in (20 + time, START, *[IMAGE] * 16, END)]
    return Medium(ids, {"pixel_values": _pixels(number, 3, 3, 56, 56)})


def _internvl_medium(kind: str, number: int) -> Medium:
    """One tile or two (the second is what a thumbnail would be), 8 x 8 patches shuffled to 4 x 4."""
    if kind == "video":
        return _frames(number)
    tiles = 1 + number % 2
    return Medium([START, *[IMAGE] * 16 * tiles, END], {"pixel_values": _pixels(number, tiles, 3, 56, 56)})


def _idefics3_medium(kind: str, number: int) -> Medium:
    """Two tiles with row and column marks between them; 8 x 8 patches shuffled to 4 x 4."""
    if kind == "video":
        return _frames(number)
    tile = [IMAGE] * 16
    return Medium([START, 104, *tile, START, 105, *tile, START], {"pixel_values": _pixels(number, 2, 3, 56, 56)})


def _qwen_medium(patch: int, frames_apart: bool) -> Callable[[str, int], Medium]:
    def medium(kind: str, number: int) -> Medium:
        frames, height, width = (1, 4, 6 + 2 * (number % 2)) if kind == "image" else (2, 4, 4)
        token = IMAGE if kind == "image" else VIDEO
        pixels = _pixels(number, frames * height * width, 3 * 2 * patch * patch)
        grid = torch.tensor([[frames, height, width]])
        rows = height * width // 4
        if kind == "image":
            return Medium([START, *[token] * rows, END], {"pixel_values": pixels, "image_grid_thw": grid})
        # Qwen3-VL writes a time stamp before every pair of frames.
        ids = [START, *[token] * rows * frames, END]
        if frames_apart:
            ids = [part for time in range(frames) for part in (20 + time, START, *[token] * rows, END)]
        return Medium(ids, {"pixel_values_videos": pixels, "video_grid_thw": grid})

    return medium


def _llava(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "text_config": text,
        "vision_config": CLIP,
        "image_token_index": IMAGE,
        "image_seq_length": 16,
        "vision_feature_layer": -2,
    }


def _next(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "llava_next",
        "text_config": text,
        "vision_config": CLIP,
        "image_token_index": IMAGE,
        "image_grid_pinpoints": PINPOINTS,
    }


_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_VISION_TEXT = dict(TEXT, rope_parameters=dict(QWEN_ROPE, mrope_section=[2, 3, 3]))

FAMILIES: dict[str, TinyFamily] = {
    family.name: family
    for family in (
        TinyFamily("llava", _llava(LLAMA), _llava_image),
        TinyFamily("llava-mistral", _llava(MISTRAL), _llava_image),
        TinyFamily("llava-next", _next(LLAMA), _anyres_image),
        TinyFamily("llava-next-mistral", _next(MISTRAL), _anyres_image),
        TinyFamily(
            "llava-onevision",
            {
                "model_type": "llava_onevision",
                "text_config": QWEN2,
                "vision_config": SIGLIP,
                "image_token_index": IMAGE,
                "video_token_index": VIDEO,
                "image_grid_pinpoints": PINPOINTS,
            },
            _onevision_medium,
            has_video=True,
        ),
        TinyFamily(
            "internvl",
            {
                "model_type": "internvl",
                "text_config": QWEN2,
                "vision_config": {
                    "model_type": "internvl_vision",
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": [56, 56],
                    "patch_size": [7, 7],
                },
                "image_token_id": IMAGE,
                "image_seq_length": 16,
            },
            _internvl_medium,
            has_video=True,
        ),
        *(
            TinyFamily(
                name,
                {
                    "model_type": name,
                    "text_config": LLAMA,
                    "vision_config": dict(ENCODER, model_type=f"{name}_vision", image_size=56),
                    "image_token_id": IMAGE,
                    "scale_factor": 2,
                    "pad_token_id": PAD,
                },
                _idefics3_medium,
                has_video=name == "smolvlm",
                joins=_tiles_a_sample,
            )
            for name in ("smolvlm", "idefics3")
        ),
        TinyFamily(
            "qwen2-vl",
            dict(
                model_type="qwen2_vl",
                text_config=_VISION_TEXT,
                vision_config={"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": 7},
                **_IDS,
            ),
            _qwen_medium(7, frames_apart=False),
            has_video=True,
        ),
        TinyFamily(
            "qwen2.5-vl",
            dict(
                model_type="qwen2_5_vl",
                text_config=_VISION_TEXT,
                vision_config={
                    "depth": 2,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "out_hidden_size": HIDDEN,
                    "num_heads": 2,
                    "patch_size": 7,
                    "window_size": 28,
                    "fullatt_block_indexes": [1],
                },
                **_IDS,
            ),
            _qwen_medium(7, frames_apart=False),
            has_video=True,
        ),
        TinyFamily(
            "qwen3-vl",
            dict(
                model_type="qwen3_vl",
                text_config=dict(_VISION_TEXT, head_dim=16, rope_parameters=dict(QWEN_ROPE, mrope_section=[4, 2, 2])),
                vision_config={
                    "depth": 4,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "out_hidden_size": HIDDEN,
                    "num_heads": 2,
                    "patch_size": 7,
                    "num_position_embeddings": 64,
                    "deepstack_visual_indexes": [0, 1, 2],
                },
                **_IDS,
            ),
            _qwen_medium(7, frames_apart=True),
            has_video=True,
            first_layer=3,
        ),
    )
}


@cache
def family_model(name: str) -> nn.Module:
    """The family's model, shared by all tests: leave it as it is."""
    return FAMILIES[name].build()
