"""A conversation as ids and labels: the template's whole text, with a loss on the answers only.

An answer is what the template adds once it is given: its text and the separator that ends the turn. So any template
that is registered, now or later, can be trained; nothing here knows how one looks, but for ``plain``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, build_prompt, conv_templates
from llava.utils import UserError

Turns = Sequence[tuple[str, str]]
Spans = list[tuple[int, int]]


def tokenize(mode: str, turns: Turns, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, both int64 ``[T]``, of ``(question, answer)`` turns under the template ``mode``.

    Ids are those of :func:`llava.mm_utils.tokenizer_image_token` for the whole text. A label is its id where the token
    begins inside an answer, ``IGNORE_INDEX`` elsewhere.

    Raises:
        UserError: a template that rewrites earlier turns, or a tokenizer that does not tell where tokens begin.
    """
    text, answers = supervised_text(mode, turns)
    bos = tokenizer.bos_token_id
    ids: list[int] = []
    labels: list[int] = []
    begin = 0
    for number, piece in enumerate(text.split(DEFAULT_IMAGE_TOKEN)):
        if number:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
        encoded = _encode(tokenizer, piece)
        tokens = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        if tokens and bos is not None and tokens[0][0] == bos:
            if not number:
                ids.append(bos)
                labels.append(IGNORE_INDEX)
            tokens = tokens[1:]
        for token, (start, _) in tokens:
            ids.append(token)
            labels.append(token if _is_inside(begin + start, answers) else IGNORE_INDEX)
        begin += len(piece) + len(DEFAULT_IMAGE_TOKEN)
    return torch.tensor(ids), torch.tensor(labels)


def supervised_text(mode: str, turns: Turns) -> tuple[str, Spans]:
    """The text of a conversation, and where its answers lie in it, ``(first character, behind the last)``."""
    template = conv_templates[mode]
    if template.sep_style is SeparatorStyle.PLAIN:
        return _caption(template.sep, turns)
    text = build_prompt(mode, turns)
    answers = []
    for number, (question, _) in enumerate(turns):
        asked = build_prompt(mode, [*turns[:number], (question, None)])
        answered = build_prompt(mode, turns[: number + 1])
        if not (text.startswith(answered) and answered.startswith(asked)):
            raise UserError(f"template {mode!r} cannot be trained: a turn changes the text in front of it")
        answers.append((len(asked), len(answered)))
    return text, answers


def _caption(separator: str, turns: Turns) -> tuple[str, Spans]:
    """As LLaVA's first stage has it: the picture and its caption; what was asked is left out."""
    text, answers = "", []
    for question, answer in turns:
        text += DEFAULT_IMAGE_TOKEN * question.count(DEFAULT_IMAGE_TOKEN)
        answers.append((len(text), len(text) + len(answer + separator)))
        text += answer + separator
    return text, answers


def _encode(tokenizer: Any, piece: str) -> Any:
    try:
        return tokenizer(piece, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise UserError(
            f"{type(tokenizer).__name__} does not tell where tokens begin; a fast tokenizer does"
        ) from error


def _is_inside(place: int, spans: Spans) -> bool:
    return any(start <= place < stop for start, stop in spans)
