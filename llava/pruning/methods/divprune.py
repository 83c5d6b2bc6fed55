"""DivPrune: the visual rows that lie farthest from each other stay (arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from ..decisions import BEFORE_DECODER, Keep
from ..knobs import Choice, Count, knob
from ..method import Method, number_of, register


@register("divprune")
@dataclass(frozen=True)
class DivPrune(Method):
    """Before the decoder, of each image's projected rows those that a greedy max-min choice by cosine distance takes.

    Newline rows of tiles are visual rows like others here; they are equal, so one of them is chosen at most. Otherwise
    than published: every image is chosen from, not the first alone, and no row is chosen twice.

    Attributes:
        keep: tokens an image, or a share of its rows, rounded half to even (paper: 0.098).
        positions: `"renumber"` (published): the decoder counts the rows that are left from 0. `"keep"`: survivors keep
            their positions.
    """

    keep: int | float = knob(Count(), 64)
    positions: str = knob(Choice(("renumber", "keep")), "renumber")

    def looks_behind(self, num_layers):
        return {BEFORE_DECODER}

    def measure(self, view):
        """`distance`: a row's from its nearest neighbour. `order`: when it was chosen, from 0; infinity: never."""
        rows = view.hidden[view.visual]
        distance, order = rows.new_zeros(2, len(rows), dtype=torch.float32)
        for image in view.trace.alive_per_image:
            own = slice(image[0], image[-1] + 1)
            distance[own], order[own] = farthest_first(rows[own], number_of(self.keep, len(image)))
            view.trace.projection_flops += 2 * len(image) ** 2 * rows.shape[1]
        return {"distance": distance, "order": order}

    def decide(self, layer, measured, trace):
        return Keep(measured["order"] < torch.inf) if measured else None


@torch.no_grad()
def farthest_first(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `rows` `[n, size]`, `count` that are far from each other by cosine: first the one whose nearest neighbour is
    farthest, then always the one farthest from all that were chosen. Ties go to the lower row.

    Returns, float32 `[n]`: the distances of the nearest neighbours; when each row was chosen, infinity for never.
    """
    unit = normalize(rows.float(), dim=1)
    between = 1 - unit @ unit.T
    # The smallest of a column is the row itself.
    nearest = between.topk(min(2, len(rows)), dim=0, largest=False).values[-1]
    order = torch.full_like(nearest, torch.inf)
    reach = nearest.clone()
    for step in range(count):
        chosen = reach.argmax(keepdim=True)
        order.index_fill_(0, chosen, step)
        to_chosen = between.index_select(0, chosen)[0]
        reach = to_chosen if step == 0 else torch.minimum(reach, to_chosen)
        reach = reach.index_fill(0, chosen, -torch.inf)
    return nearest, order
