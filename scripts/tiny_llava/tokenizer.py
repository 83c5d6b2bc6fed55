"""The shipped model's own tokenizer: whole words of its little language over a byte alphabet.

A word it knows is one token; every other text is spelled in bytes, so anything can be typed. Characters that a
picture's text may hold are tokens with and without a leading space, so "k7q" is three tokens, as it is three
glyphs in the picture.
"""

from __future__ import annotations

import random
import string

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates

from .easyvqa import easy_questions
from .questions import INSTRUCTION, NUMBERS, WRITERS, YES_NO, _plural, describe
from .renderer import COLORS, GRID, SHAPES, SIZES, make_scene

TEMPLATE = "vicuna_v1"
BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
_PIECES = r"\?|,| ?[^\s?,]+|\s"


def prompt(question: str, answer: str | None = None) -> str:
    """The conversation of one turn as the shipped model's template writes it, image mark included."""
    conversation = conv_templates[TEMPLATE].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
    conversation.append_message(conversation.roles[1], answer)
    return conversation.get_prompt()


def _corpus() -> list[str]:
    rng = random.Random("words")
    texts = [
        prompt("USER: ASSISTANT:"),
        "USER: What",
        "\n",
        f" {YES_NO}",
        " Reference OCR token:",
        "Reference OCR token:",
    ]
    for _ in range(2000):
        scene = make_scene(rng)
        for ask in WRITERS:
            question = ask(scene, rng)
            if question and question.task not in ("spelling", "text_ocr"):
                answer = "" if question.task == "text" else question.answer
                texts.append(f"{question.text} {answer}")
        if scene.text is None:
            texts.append(f" {describe(scene, rng)}")
    for text, answer, _ in easy_questions("train"):
        texts += [f"{text} {answer}", text[0].upper() + text[1:]]
    texts.append(" Does the text say column row the text at a")
    texts += [f" {word}" for word in (*NUMBERS, *SHAPES, *COLORS, *SIZES, "left", "right", "above", "below")]
    texts += [f" {_plural(shape, None)}" for shape in (*SHAPES, None)]
    texts += [f" column{place} row{place}" for place in range(GRID)]
    return texts


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, always the same: no chance, no training."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {piece for text in _corpus() for piece, _ in splitter.pre_tokenize_str(text)}
    space = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(" ")[0][0]
    characters = string.ascii_letters + string.digits
    spaced = [space + character for character in characters]
    known = [UNKNOWN, BOS, EOS, *alphabet, *spaced]
    known += sorted(words - set(known))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: number for number, word in enumerate(known)},
            merges=[(space, character) for character in characters],
            unk_token=UNKNOWN,
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (UNKNOWN, BOS, EOS)])
    tokenizer.add_tokens([AddedToken(f"\n{INSTRUCTION}", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def split_prompt(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[int]]:
    """Ids before and after the picture, exactly as every program of the project tokenises the prompt."""
    from llava.mm_utils import tokenizer_image_token

    ids = tokenizer_image_token(text, tokenizer)
    place = ids.index(IMAGE_TOKEN_INDEX)
    return ids[:place], ids[place + 1 :]
