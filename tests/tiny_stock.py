"""A tiny checkpoint of a family that transformers itself runs, processor and chat template included."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from family_models import FAMILIES
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

# The ids are those of `family_models`: words below 100, then the image and the marks around it.
WORDS = ["<pad>", "<unk>", "</s>", "USER:", "ASSISTANT:", "what", "is", "this", "red", "blue", "a", "cat"]
MARKS = ["<image>", "<video>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}"
    "{% endif %}{% endfor %}<end_of_utterance> {% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def write_stock(folder: Path, splits: bool = False) -> Path:
    """An Idefics3 checkpoint: the one family whose processor needs no torchvision for video.

    Skips the test where transformers cannot load it: 5.17 finds no image processor without torchvision.

    Args:
        splits: whether its processor cuts pictures into tiles of 56 pixels, two along the longer side.
    """
    if transformers.__version__.startswith("5.17.") and find_spec("torchvision") is None:
        pytest.skip("transformers 5.17 makes image processors only with torchvision")
    words = WORDS + [f"w{number}" for number in range(100 - len(WORDS))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in MARKS], special_tokens=True)
    tile, size = {"longest_edge": 56}, {"longest_edge": 112 if splits else 56}
    images = Idefics3ImageProcessorPil(size=size, max_image_size=tile, do_image_splitting=splits)
    Idefics3Processor(images, tokenizer, image_seq_len=16, chat_template=TEMPLATE).save_pretrained(folder)
    FAMILIES["idefics3"].build().save_pretrained(folder)
    return folder
