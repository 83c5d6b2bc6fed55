"""SCOPE: patches that cover much of the image that is not covered yet, and are attended to (arXiv 2510.24214)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..by_picture import ByPicture
from ..knobs import Between, Choice, Count, knob
from ..method import number_of, register

EXHAUSTED = 1e-6
"""Gains below this part of the first are rounding; attention alone decides then."""


@register("scope")
@dataclass(frozen=True)
class Scope(ByPicture):
    """Of each picture, one patch after the other: newly covered cosine similarity times the class token's attention.

    A patch is covered as much as the chosen one most like it; a candidate's gain is what it would add over all patches.

    Attributes:
        keep: tokens an image, of which each of its crops gets an equal part, rounded down; or a share of its patches,
            rounded half to even.
        alpha: exponent of the attention; 0: coverage alone.
        positions: `"renumber"` (published): the decoder counts the rows that are left from 0. `"keep"`: survivors keep
            their positions.
    """

    keep: int | float = knob(Count(), 64)
    alpha: float = knob(Between(0), 1.0)
    positions: str = knob(Choice(("renumber", "keep")), "renumber")

    def look(self, picture, rows):
        attention, similar = picture.attention.sum(0), picture.similarity()
        weight = attention**self.alpha
        covered, kept = torch.zeros_like(attention), torch.zeros_like(attention)
        first = gain = similar.clamp(min=0).sum(1)
        count = number_of(self.keep if isinstance(self.keep, float) else self.keep // picture.crop.of, len(picture))
        for step in range(count):
            left = gain.masked_fill(kept > 0, -torch.inf)
            score = torch.where(left.max() < EXHAUSTED * first.max(), attention, gain * weight)
            best = score.masked_fill(kept > 0, -torch.inf).argmax(keepdim=True)
            kept.index_fill_(0, best, count - step)
            covered = torch.maximum(covered, similar[best][0])
            gain = (similar - covered).clamp_(min=0).sum(1)
        return {"attention": attention, "score": first * weight, "kept": kept}
