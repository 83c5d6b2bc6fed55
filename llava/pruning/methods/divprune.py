"""DivPrune: the visual rows that lie farthest from each other stay (arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch.nn.functional import normalize

from ..decisions import BEFORE_DECODER, Keep
from ..knobs import Choice, Count, knob
from ..method import Method, number_of, register
from ..varlen import to_device


@register("divprune")
@dataclass(frozen=True)
class DivPrune(Method):
    """Before the decoder, of each image's projected rows those that a greedy max-min choice by cosine distance takes.

    All tiles of an image are one pool. Otherwise than published: every image is chosen from, not the first alone, and
    no row is chosen twice.

    Attributes:
        keep: tokens an image, or a share of its rows, rounded half to even (paper: 0.098).
        positions: `"renumber"` (published): the decoder counts the rows that are left from 0. `"keep"`: survivors keep
            their positions.
        newlines: rows that end a line of tiles, which are all equal. `"pool"` (published): candidates like others, so
            that one of them is chosen at most. `"stay"`: all stay, beside those that `keep` counts, where it is known
            which they are.
    """

    keep: int | float = knob(Count(), 64)
    positions: str = knob(Choice(("renumber", "keep")), "renumber")
    newlines: str = knob(Choice(("pool", "stay")), "pool")

    def looks_behind(self, num_layers):
        return {BEFORE_DECODER}

    def measure(self, view):
        """`distance`: a row's from its nearest neighbour. `order`: when it was chosen, from 0; infinity: never; -1: it
        ends a line of tiles, and stays."""
        rows = view.hidden[view.visual]
        distance, order = rows.new_full((2, len(rows)), -1, dtype=torch.float32)
        pools = view.trace.alive_per_image
        if self.newlines == "stay":
            images = groupby(view.crops, lambda crop: crop.image)
            pools = [np.sort(np.concatenate([crop.rows for crop in crops])) for _, crops in images]
        for pool in pools:
            own = to_device(torch.from_numpy(pool), torch.int64, rows.device)
            distance[own], order[own] = farthest_first(rows[own], number_of(self.keep, len(pool)))
            view.trace.projection_flops += 2 * len(pool) ** 2 * rows.shape[1]
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
