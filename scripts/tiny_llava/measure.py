"""Accuracy of the exported checkpoint through the project's own loader, generation and pruning engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llava.constants import SHIPPED_MODEL_PATH
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningTrace, prune
from llava.pruning.policy import PolicyFactory
from PIL import Image

from .data import SIDE_BY_SIDE, phrase
from .easyvqa import easy_by_image, easy_picture
from .questions import write_questions
from .renderer import make_scene, render
from .tokenizer import prompt

ANSWER_TOKENS = 6


@dataclass(frozen=True)
class Sample:
    """One question about one picture."""

    picture: Image.Image
    question: str
    answer: str
    task: str


def rendered_samples(split: str, pictures: int) -> list[Sample]:
    """Questions about the first pictures of a held-out split, the same as `data.held_out_batch` draws."""
    samples = []
    for index in range(pictures):
        rng = random.Random(f"{split}/{index}")
        scene = make_scene(rng)
        questions = write_questions(scene, rng, SIDE_BY_SIDE)
        picture = render(scene)
        samples += [Sample(picture, phrase(q, rng), q.answer, q.task) for q in questions]
    return samples


def easy_samples(pictures: int | None = None, split: str = "test") -> list[Sample]:
    """Every question of the first pictures of easy-VQA's test split, as written."""
    return [
        Sample(easy_picture(split, image), text, answer, "easy-VQA")
        for image, asked in easy_by_image(split)[:pictures]
        for text, answer in asked
    ]


class Shipped:
    """The checkpoint, loaded as any user loads it (float32 on CPU)."""

    def __init__(self, path: str | None = None) -> None:
        self.path = str(path or SHIPPED_MODEL_PATH)
        loaded = load_pretrained_model(self.path, None, "tiny_llava", device="cpu", dtype=torch.float32)
        self.tokenizer, self.model, self.processor, _ = loaded

    def answer(
        self,
        samples: Sequence[Sample],
        config: dict[str, Any] | None = None,
        policy: PolicyFactory | None = None,
        batch: int = 32,
    ) -> tuple[list[str], list[PruningTrace]]:
        """Greedy answers and traces, in the samples' order; dense if neither config nor policy is given."""
        ids = [tokenizer_image_token(prompt(sample.question), self.tokenizer) for sample in samples]
        order = sorted(range(len(samples)), key=lambda k: len(ids[k]))
        answers: list[str] = [""] * len(samples)
        traces: list[Any] = [None] * len(samples)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            longest = max(len(ids[k]) for k in chosen)
            rows = torch.zeros(len(chosen), longest, dtype=torch.long)
            mask = torch.zeros_like(rows)
            for row, k in enumerate(chosen):
                rows[row, longest - len(ids[k]) :] = torch.tensor(ids[k])
                mask[row, longest - len(ids[k]) :] = 1
            images = process_images([samples[k].picture for k in chosen], self.processor, self.model.config)
            with prune(self.model, config, policy=policy) as run:
                new = self.model.generate(
                    rows, images=images, attention_mask=mask, do_sample=False, max_new_tokens=ANSWER_TOKENS
                )
            for row, k in enumerate(chosen):
                answers[k] = self.tokenizer.decode(new[row], skip_special_tokens=True).strip()
                traces[k] = run.traces[row]
        return answers, traces


def score(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Right answers and questions of every task."""
    counts: dict[str, list[int]] = {}
    for sample, answer in zip(samples, answers, strict=True):
        right = counts.setdefault(sample.task, [0, 0])
        right[0] += answer == sample.answer
        right[1] += 1
    return {task: (right, count) for task, (right, count) in sorted(counts.items())}
