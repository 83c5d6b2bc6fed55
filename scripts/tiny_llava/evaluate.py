"""Held-out accuracy per task.

An answer counts if every one of its tokens, and the end after it, is the most likely next token given the ones
before: exactly then greedy generation gives that answer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable

import torch

from llava.utils import fast_autocast

from .data import Batch
from .model import Learner

NORMAL_95 = 1.959964  # the normal distribution has 95 % within so many standard deviations


def interval(correct: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if count == 0:
        return 0.0, 1.0
    z, share = NORMAL_95, correct / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def logits_of(
    learner: Learner, before: torch.Tensor, batch: Batch, blind: Container[int] = ()
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]:
    """Answer logits [B, T, vocabulary], patch logits where the batch has pictures, and losses on what is named."""
    if batch.pixels is None:
        context, valid, patches = learner.llava.model.embed_tokens(batch.words), batch.valid, None
    else:
        features = learner.features(batch.pixels)
        context, patches = learner.project(features), learner.patch_logits(features)
        valid = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
    logits, losses = learner.answer_logits(
        context, valid, before, batch.ids, batch.segments, batch.places, blind, batch.mentions
    )
    return logits, patches, losses


@torch.no_grad()
def evaluate(
    learner: Learner, before: torch.Tensor, batches: Iterable[Batch], blind: Container[int] = ()
) -> dict[str, tuple[int, int]]:
    """Right answers and questions of every task."""
    right, asked = Counter(), Counter()
    device = before.device
    for batch in batches:
        moved = batch.to(device)
        with fast_autocast(device):
            logits, _, _ = logits_of(learner, before, moved, blind)
        wrong = (logits.argmax(-1) != moved.targets) & (moved.targets != -100)
        for row, tasks in enumerate(batch.tasks):
            missed = set(moved.segments[row][wrong[row]].tolist())
            for number, task in enumerate(tasks, start=1):
                asked[task] += 1
                right[task] += number not in missed
    return {task: (right[task], asked[task]) for task in sorted(asked)}


def summary(results: dict[str, tuple[int, int]]) -> str:
    """One line: percent correct of every task."""
    return "  ".join(f"{task} {100 * right / count:.1f}" for task, (right, count) in results.items())
