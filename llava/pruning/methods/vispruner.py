"""VisPruner: what the class token attends to, and what is least alike among the rest (arXiv 2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..by_picture import ByPicture
from ..knobs import Between, Choice, Count, knob
from ..method import number_of, register

AT_ONCE = 8
"""Rows that leave in one round, a literal of the published code."""


@register("vispruner")
@dataclass(frozen=True)
class VisPruner(ByPicture):
    """Of each picture, a part of the budget by the class token's attention, the rest by removing near-duplicates.

    Round by round the patches that are left are split into every other one and its neighbours; of the first, those
    most like one of the second leave. A round's split depends on the order that the round before left, so that rounding
    can change the choice. With `important` 1 this is FasterVLM.

    Attributes:
        keep: tokens an image, of one in tiles: of each of its crops; or a share of its patches, rounded half to even.
        important: share of them chosen by attention, 0 … 1, truncated.
        positions: `"renumber"` (published): the decoder counts the rows that are left from 0. `"keep"`: survivors keep
            their positions.
    """

    keep: int | float = knob(Count(), 64)
    important: float = knob(Between(0, 1), 0.5)
    positions: str = knob(Choice(("renumber", "keep")), "renumber")

    def look(self, picture, rows):
        attention = picture.attention.mean(0)
        count = number_of(self.keep, len(picture))
        order = attention.argsort(descending=True, stable=True)
        by_attention = int(count * self.important)
        important, residual, diverse = order[:by_attention], order[by_attention:], count - by_attention
        similar = picture.similarity() if diverse else None
        while similar is not None and len(residual) > diverse:
            ranked, others = residual[::2], residual[1::2]
            leaving = min(AT_ONCE, len(residual) - diverse, len(ranked))
            likeness = similar[ranked[:, None], others].amax(dim=1)
            ranked = ranked[likeness.argsort(descending=True, stable=True)]
            residual = torch.cat([ranked[leaving:], others])
        staying = torch.cat([important, residual[:diverse]])
        return {"attention": attention, "kept": torch.zeros_like(attention).index_fill_(0, staying, 1)}
