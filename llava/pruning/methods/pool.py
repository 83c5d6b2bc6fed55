"""Pool: block by block, patches are averaged; the floor that merging has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import isqrt

import numpy as np
import torch

from ..decisions import BEFORE_DECODER, Keep
from ..knobs import Integer, knob
from ..method import Method, register
from ..varlen import to_device


@register("pool")
@dataclass(frozen=True)
class Pool(Method):
    """Before the decoder, each image's projected rows are averaged over blocks of `factor` x `factor` patches.

    An image with a square number of rows is taken as that square grid; blocks at its right and lower edge may be
    smaller. The grid of any other (anyres tiles with newline rows, a merger's oblong) is not known here: `factor`²
    consecutive rows are a block. The mean stands at the place and position of its block's first patch.

    Attributes:
        factor: patches along a block's side, from 1.
    """

    factor: int = knob(Integer(1), 3)

    @property
    def is_dense(self):  # type: ignore[override]
        return self.factor == 1

    def decides_behind(self, num_layers):
        return {BEFORE_DECODER}

    def decide(self, layer, measured, trace):
        if layer != BEFORE_DECODER:
            return None
        blocks = np.empty(len(trace.alive), dtype=np.int64)  # the number of each row's block
        count = 0
        for image in trace.alive_per_image:
            own = self.blocks(len(image))
            blocks[image] = own + count
            count += own.max() + 1
        members = [np.flatnonzero(blocks == block) for block in range(count)]
        return Keep(
            np.array([rows[0] for rows in members]),
            partial(means, members=members),
            {int(rows[0]): rows for rows in members if len(rows) > 1},
        )

    def blocks(self, rows: int) -> np.ndarray:
        """Which block each of an image's `rows` belongs to, int64, numbered in the order of their first rows."""
        side = isqrt(rows)
        if side**2 != rows:
            return np.arange(rows) // self.factor**2
        line, column = np.divmod(np.arange(rows), side)
        return line // self.factor * -(-side // self.factor) + column // self.factor


def means(states: torch.Tensor, members: list[np.ndarray]) -> torch.Tensor:
    """Float32 means `[len(members), hidden]` of the `states` `[rows, hidden]` of each block's `members`."""
    sizes = np.array([len(rows) for rows in members])
    index = np.array([np.pad(rows, (0, sizes.max() - len(rows)), "edge") for rows in members])
    weights = (np.arange(sizes.max()) < sizes[:, None]) / sizes[:, None]
    own = states[to_device(torch.from_numpy(index), torch.int64, states.device)].float()
    return (own * to_device(torch.from_numpy(weights), torch.float32, states.device)[..., None]).sum(1)
