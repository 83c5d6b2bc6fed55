"""A small random LLaVA checkpoint with a word for every id, for the tests of what is drawn and served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_checkpoints import VISION, VOCAB, tiny_config, tiny_model, write_original
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LAYERS = 6
# Selects, keeps some patches and lets them go again.
PRUNING = {
    "mode": ["shallow", "middle", "deep"],
    "shallow_mid_layer": 1,
    "layer_threshold": 0.9999,
    "tokens_threshold": 0.05,
    "exit_threshold": 0.9,
}
HOSTILE = "</script><img/src=x/onerror=alert(1)>"


def word_tokenizer(words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Every id is a word; `words` stand behind the usual ones."""
    known = ["<unk>", "<s>", "</s>", "USER:", "ASSISTANT:", "what", "is", "this", *words]
    vocab = {word: index for index, word in enumerate([*known, *(f"w{i}" for i in range(len(known), VOCAB))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def write_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **config) -> Path:
    """A checkpoint of six layers and 4 x 4 patches that never ends its answer."""
    tower = {**VISION, "image_size": 56}
    model = tiny_model(tiny_config(num_hidden_layers=LAYERS, vision_config=tower, **config), seed=3)
    with torch.no_grad():
        model.lm_head.weight[:3] = 0
    path = write_original(folder, model, vision_config=tower)
    (tokenizer or word_tokenizer()).save_pretrained(path)
    (path / "pruning_config.json").write_text(json.dumps(PRUNING))
    return path


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Grey noise around the middle, the same every time (`Image.effect_noise` is not)."""
    width, height = size
    values = np.random.default_rng(seed).normal(128, 80, (height, width)).clip(0, 255)
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")
