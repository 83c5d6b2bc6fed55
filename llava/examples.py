"""What the shipped model can be asked: pictures and questions that come with it, and how to tell others from them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava.constants import ANSWER_INSTRUCTION, DEFAULT_IMAGE_TOKEN, SHIPPED_MODEL_PATH
from llava.errors import UserError

FOLDER = Path(__file__).parent / "assets" / "images"

_PLAIN = 0.5
"""Least part of a picture that has one colour: its held-out pictures have 0.74 and more, photographs 0.33 and less."""


@dataclass(frozen=True)
class Example:
    """A picture that ships, a question that the shipped model answers rightly, and the answer."""

    name: str
    image: Path
    question: str
    answer: str


def examples() -> list[Example]:
    """All of them, the one that shows pruning best first.

    `scripts/choose_example.py` says how that one was chosen, and how the others fare.
    """
    written = json.loads((FOLDER / "examples.json").read_text(encoding="utf-8"))
    return [Example(entry["name"], FOLDER / entry["image"], entry["question"], entry["answer"]) for entry in written]


def example_named(name: str) -> Example:
    """The example of that name.

    Raises:
        UserError: there is none.
    """
    known = {example.name: example for example in examples()}
    if name not in known:
        raise UserError(f"there is no example {name!r}; there are {', '.join(known)}")
    return known[name]


def outside_its_world(checkpoint: Any, question: str, images: Sequence[Image.Image]) -> str | None:
    """Why the shipped model can only guess an answer, in one line; None where nothing says so, or for another model.

    It is no judge of answers: it finds words that training never showed, and pictures without the plain ground that
    all of training's had.

    Args:
        checkpoint: a `llava.inference.Checkpoint`.
        question: as it is asked.
        images: all pictures of the conversation.
    """
    if Path(checkpoint.model_path) != SHIPPED_MODEL_PATH:
        return None
    text = question.replace(DEFAULT_IMAGE_TOKEN, "").replace(ANSWER_INSTRUCTION, "")
    unknown = [word for word in dict.fromkeys(re.findall(r"[^\s?,.!]+", text)) if not _is_word(checkpoint, word, text)]
    reasons = []
    if unknown:
        are = "is no word" if len(unknown) == 1 else "are no words"
        reasons.append(f"{', '.join(map(repr, unknown))} {are} of its training")
    if any(_part_of_one_colour(image) < _PLAIN for image in images):
        reasons.append("its pictures all had a plain ground")
    if not images:
        reasons.append("it was never asked without a picture")
    if not reasons:
        return None
    return (
        "the shipped model knows coloured shapes and short texts, and nothing else; expect a guess: "
        + "; ".join(reasons)
        + " (visipruner ask --examples lists what it can answer)"
    )


def _is_word(checkpoint: Any, word: str, question: str) -> bool:
    # Texts in pictures are spelled out, one token a letter, and a question may name one.
    if re.fullmatch(r"[a-z0-9]{1,3}", word) and re.search("text|written", question):
        return True
    return any(len(checkpoint.tokenizer.tokenize(form)) == 1 for form in (word, f" {word}"))


def _part_of_one_colour(image: Image.Image) -> float:
    small = image.convert("RGB")
    small.thumbnail((96, 96))
    coarse = small.quantize(64, kmeans=0).convert("RGB").point(lambda value: value & 0xF0)
    return max(count for count, _ in coarse.getcolors(96 * 96) or [(0, None)]) / (small.width * small.height)
