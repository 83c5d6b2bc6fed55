"""Batches: pictures or their descriptions, with as many questions as fit behind them.

A batch depends on seed, stage and step alone, so a run that is resumed goes on with the batches it would have
seen.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from .easyvqa import easy_by_image, easy_labels, easy_picture
from .questions import INSTRUCTION, YES_NO, Question, describe, mentions, write_questions
from .renderer import (
    COLORS,
    GRID,
    SHAPES,
    SIDE,
    SIZES,
    TEXT,
    Item,
    Scene,
    make_scene,
    patch_labels,
    patches_of,
    render,
)
from .tokenizer import prompt, split_prompt

NEWLINE = "\n"

TAIL = 120  # rows for the questions of one picture
DESCRIPTION = 64  # rows for a scene in words
SIDE_BY_SIDE = 9  # questions tried for a picture
READ = {"shape": list(SHAPES), "color": list(COLORS), "size": list(SIZES)}  # what a name's row should know


@dataclass(frozen=True)
class Mentions:
    """The noun phrases of a batch's questions, and what they stand for; also the ends of questions for a text.

    `where` int64 [n, 2] is a sample and the row behind its picture where the phrase or question ends; `patches` bool
    [n, 144] are those of all things that fit (None for scenes in words); `written` bool [n] tells questions for a text
    from noun phrases; `labels` int64 [n, 4] are how many things a phrase fits and, of a single one, its shape, colour
    and size (-100 where there is none or more); `centres` float [n, 2] its place, x and y from -1 to 1 (nan likewise).
    """

    where: torch.Tensor
    written: torch.Tensor
    labels: torch.Tensor
    centres: torch.Tensor
    patches: torch.Tensor | None

    @classmethod
    def of(cls, found: Sequence[tuple[int, int, list[Item] | None]], patches: Sequence[np.ndarray]) -> Mentions | None:
        """From (sample, row, things) of each phrase, None for the end of a question for a text."""
        if not found:
            return None
        labels = torch.full((len(found), 1 + len(READ)), -100)
        centres = torch.full((len(found), 2), torch.nan)
        for number, (_, _, items) in enumerate(found):
            if items is not None:
                labels[number, 0] = len(items)
            if items and len(items) == 1:
                (item,) = items
                labels[number, 1:] = torch.tensor([names.index(getattr(item, name)) for name, names in READ.items()])
                centres[number] = torch.tensor([item.cx, item.cy]) / (SIDE / 2) - 1
        where = torch.tensor([[sample, row] for sample, row, _ in found])
        written = torch.tensor([items is None for _, _, items in found])
        return cls(where, written, labels, centres, torch.from_numpy(np.stack(patches)) if patches else None)

    def to(self, device: torch.device) -> Mentions:
        """The same on a device."""
        return Mentions(**{name: value if value is None else value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Batch:
    """Tensors as `Learner` takes them; `tasks` names the task of every segment (index 1, 2, …) of every sample."""

    pixels: torch.Tensor | None
    labels: torch.Tensor | None
    words: torch.Tensor | None
    valid: torch.Tensor | None
    ids: torch.Tensor
    segments: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    tasks: list[list[str]]
    mentions: Mentions | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {
            name: value.to(device) if isinstance(value, torch.Tensor | Mentions) else value
            for name, value in vars(self).items()
        }
        return Batch(**moved)


class Encoder:
    """Turns questions and answers into ids and targets."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.before = split_prompt(tokenizer, prompt("What?"))[0]
        self._encode = tokenizer.backend_tokenizer.encode
        self._ids = functools.lru_cache(maxsize=100_000)(self._tokenize)

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self._encode(text, add_special_tokens=False).ids)

    def turn(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Ids behind the picture, and the target of each: what to say next where it is the answerer's turn.

        The pieces are those of `prompt`; that they tokenise as the whole does is guarded by a test.
        """
        ids: list[int] = []
        targets: list[int] = []
        for number, (question, answer) in enumerate(turns):
            asked = self._ids(f"{'USER: ' if number else NEWLINE}{question} ASSISTANT:")
            said = (*self._ids(f" {answer}"), self.tokenizer.eos_token_id)
            ids += [*asked, *said]
            targets += [-100] * (len(asked) - 1) + [*said, -100]
        return ids[:-1], targets[:-1]

    def words(self, text: str) -> list[int]:
        """Ids of a description, in the place of the picture."""
        return list(self._tokenize(text))

    def mentions(self, scene: Scene, starts: Sequence[tuple[int, str]]) -> list[tuple[int, list[Item] | None]]:
        """Where noun phrases of packed questions end (`starts` as `pack` gives them), and what they fit.

        Of questions for the scene's text, the row before the answer, and None.
        """
        found: list[tuple[int, list[Item] | None]] = []
        for start, text in starts:
            phrases = mentions(scene, text)
            found += [(start + len(self._ids(NEWLINE + text[:end])) - 1, items) for end, items in phrases]
            if scene.text and not phrases:
                found.append((start + len(self._ids(f"{NEWLINE}{text} ASSISTANT:")) - 1, None))
        return found

    def pack(
        self, turns: Iterable[tuple[tuple[tuple[str, str], ...], str]]
    ) -> tuple[np.ndarray, list[str], list[tuple[int, str]]]:
        """Ids, segments, places and targets [4, TAIL] of the conversations that fit, their tasks, and their starts.

        A start is the first row of a conversation, with its first question.
        """
        rows = np.zeros((4, TAIL), dtype=np.int64)
        rows[3] = -100
        used, tasks, starts = 0, [], []
        for turn, task in turns:
            ids, targets = self.turn(turn)
            end = used + len(ids)
            if end > TAIL:
                continue
            tasks.append(task)
            starts.append((used, turn[0][0]))
            rows[0, used:end], rows[1, used:end] = ids, len(tasks)
            rows[2, used:end], rows[3, used:end] = range(len(ids)), targets
            used = end
        return rows, tasks, starts


def phrase(question: Question, rng: random.Random) -> str:
    """A question as people ask it: half of them with the line that wants one word."""
    text = question.text
    if question.answer in ("yes", "no") and rng.random() < 0.15:
        text += f" {YES_NO}"
    return f"{text}\n{INSTRUCTION}" if rng.random() < 0.5 else text


def _conversations(questions: Sequence[Question], rng: random.Random) -> list:
    """Most questions alone, some as the second turn of a chat."""
    waiting = [((phrase(question, rng), question.answer), question.task) for question in questions]
    turns = []
    while waiting:
        turn, task = waiting.pop()
        if waiting and rng.random() < 0.06:
            later, task = waiting.pop()
            turns.append(((turn, later), task))
        else:
            turns.append(((turn,), task))
    return turns


def as_pixels(picture: Image.Image) -> np.ndarray:
    """uint8 [96, 96, 3], resized as the image processor does."""
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(picture)


@functools.cache
def _easy_sample(split: str, image: int) -> tuple[np.ndarray, np.ndarray]:
    picture = easy_picture(split, image)
    return as_pixels(picture), easy_labels(picture)


def _easy_questions(questions: list[tuple[str, str]], rng: random.Random) -> list[Question]:
    chosen = rng.sample(questions, min(SIDE_BY_SIDE, len(questions)))
    return [
        Question(text[0].upper() + text[1:] if rng.random() < 0.5 else text, answer, "easy-VQA", "", "")
        for text, answer in chosen
    ]


def picture_batch(encoder: Encoder, rng: random.Random, size: int, easy: float, ask: bool = True) -> Batch:
    """Pictures with questions (none unless `ask`); the share `easy` of them from easy-VQA's training split."""
    pixels, labels, packed, tasks = [], [], [], []
    named: list[tuple[int, int, list[Item] | None]] = []
    patches: list[np.ndarray] = []
    for _ in range(size):
        scene = None
        if rng.random() < easy:
            image, asked = rng.choice(easy_by_image("train"))
            shown, said = _easy_sample("train", image)
            questions = _easy_questions(asked, rng) if ask else []
        else:
            scene = make_scene(rng)
            shown, said = np.asarray(render(scene)), patch_labels(scene)
            questions = write_questions(scene, rng, SIDE_BY_SIDE, training=True) if ask else []
        rows, kinds, starts = encoder.pack(_conversations(questions, rng))
        if scene:
            found = encoder.mentions(scene, starts)
            named += [(len(pixels), row, items) for row, items in found]
            patches += [_named(said, items) for _, items in found]
        pixels.append(shown)
        labels.append(said)
        packed.append(rows)
        tasks.append(kinds)
    return _stack(packed, tasks, Mentions.of(named, patches), pixels=pixels, labels=labels)


def _named(labels: np.ndarray, items: list[Item] | None) -> np.ndarray:
    """Patches of things, bool [144]; of the text if None."""
    if items is None:
        return labels[:, 0] == TEXT
    return np.any([np.zeros(GRID * GRID, dtype=bool), *(patches_of(labels, item) for item in items)], axis=0)


def word_batch(encoder: Encoder, rng: random.Random, size: int) -> Batch:
    """Scenes in words with questions."""
    words = np.zeros((size, DESCRIPTION), dtype=np.int64)
    valid = np.zeros((size, DESCRIPTION), dtype=bool)
    packed, tasks, named = [], [], []
    for sample in range(size):
        scene = make_scene(rng)
        ids = encoder.words(describe(scene, rng))
        words[sample, : len(ids)], valid[sample, : len(ids)] = ids, True
        questions = write_questions(scene, rng, SIDE_BY_SIDE, training=True)
        rows, kinds, starts = encoder.pack(_conversations(questions, rng))
        named += [(sample, row, items) for row, items in encoder.mentions(scene, starts)]
        packed.append(rows)
        tasks.append(kinds)
    return _stack(packed, tasks, Mentions.of(named, ()), words=words, valid=valid)


def held_out_batch(encoder: Encoder, start: int, size: int, split: str = "validation") -> Batch:
    """Rendered pictures `start` … `start + size - 1` of a held-out split, with one-turn questions."""
    pixels, labels, packed, tasks = [], [], [], []
    for index in range(start, start + size):
        rng = random.Random(f"{split}/{index}")
        scene = make_scene(rng)
        questions = write_questions(scene, rng, SIDE_BY_SIDE)
        rows, kinds, _ = encoder.pack([(((phrase(q, rng), q.answer),), q.task) for q in questions])
        pixels.append(np.asarray(render(scene)))
        labels.append(patch_labels(scene))
        packed.append(rows)
        tasks.append(kinds)
    return _stack(packed, tasks, pixels=pixels, labels=labels)


def easy_batches(encoder: Encoder, split: str, size: int, limit: int | None = None) -> Iterable[Batch]:
    """Every question of an easy-VQA split as it is written, pictures repeated where theirs fill several rows."""
    samples = []
    for image, asked in easy_by_image(split)[:limit]:
        left = [(((text, answer),), "easy-VQA") for text, answer in asked]
        while left:
            rows, kinds, _ = encoder.pack(left)
            samples.append((*_easy_sample(split, image), rows, kinds))
            left = left[len(kinds) :]
    while len(samples) % size:  # equal shapes compile once; the filling has no questions
        shown, said, rows, _ = samples[0]
        empty = np.zeros_like(rows)
        empty[3] = -100
        samples.append((shown, said, empty, []))
    for start in range(0, len(samples), size):
        pixels, labels, packed, tasks = zip(*samples[start : start + size], strict=True)
        yield _stack(list(packed), list(tasks), pixels=list(pixels), labels=list(labels))


def _stack(packed: list, tasks: list[list[str]], mentions: Mentions | None = None, **parts) -> Batch:
    ids, segments, places, targets = torch.from_numpy(np.stack(packed)).unbind(1)
    tensors = {name: torch.from_numpy(np.stack(list(values))) for name, values in parts.items()}
    empty = dict.fromkeys(("pixels", "labels", "words", "valid"))
    return Batch(
        **{**empty, **tensors},
        ids=ids,
        segments=segments,
        places=places,
        targets=targets,
        tasks=tasks,
        mentions=mentions,
    )
