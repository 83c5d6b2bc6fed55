"""The words of a method's decisions: what a layer does with the image, and which visual rows go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from .tower import Picture

BEFORE_DECODER = -1
"""The `layer` of a view or decision at the decoder's input."""


class Read(Enum):
    """What the rows of a prompt may read of the image in one layer, during prefill.

    Attention weights are set to zero after the softmax and not renormalised: the mass that went to the image
    is lost (arXiv 2510.17205, shallow stage).
    """

    ALL = "all"
    """Ordinary causal attention."""
    NO_IMAGE = "no image"
    """Text rows put weight 0 on every visual row. Visual rows and the prefix are untouched."""
    FIRST_SINK = "first sink"
    """All a text row gives to the image goes to the first visual row; visual rows read no visual row."""
    HALF_SINK = "half sink"
    """Text rows put weight 0 on the first half of the visual rows; visual rows read no visual row."""

    def visible(self, num_visual: int) -> int:
        """Of `num_visual` visual rows, how many have values that text rows read."""
        hidden = {
            Read.ALL: 0,
            Read.NO_IMAGE: num_visual,
            Read.FIRST_SINK: num_visual - 1,
            Read.HALF_SINK: num_visual // 2,
        }
        return num_visual - hidden[self]


@dataclass(frozen=True)
class Treatment:
    """What one layer does with the image.

    Attributes:
        read: what text may read of it.
        update: False: visual rows give keys and values only. Their queries, output projection and MLP are not
            computed; their states go on unchanged.
        present: False: visual rows sit the layer out. Nothing is computed for them, keys and values neither, so that
            its cache holds none of them; text attends to text, with weights that sum to 1 over it, which is not what
            `Read.NO_IMAGE` means. Behind it they are back, unchanged. The other two then say nothing.
    """

    read: Read = Read.ALL
    update: bool = True
    present: bool = True


class Cause(Enum):
    """Why visual rows leave."""

    SELECTION = "selection"
    """Some were chosen to stay."""
    EXIT = "exit"
    """All that are left go."""


@dataclass(frozen=True)
class Keep:
    """Which visual rows go on, valid from the next layer's input.

    Attributes:
        rows: int64 indices into the visual rows that are still there, in the order in which they go on; a bool mask
            over them is taken too. They take the places of the kept rows, from first to last.
        merge: states `[visual rows still there, hidden_size]` → states `[len(rows), hidden_size]` of those that go
            on, in the order of `rows`; None: they keep their own. Runs on the device.
        groups: for a kept row that stands for others after `merge`, index → the indices it stands for.
        from_tower: instead of `merge`, pictures of the prompt and the states that `merge` gets → states
            `[len(rows), hidden_size]` of those that go on, for rows that are made of what the vision tower saw. Before
            the decoder only.
        lent: those of `rows` whose places go to rows that stand for no patch (a class token). Their position is -1.
        cause: `SELECTION` chose among visual rows, `EXIT` lets all that are left go.
    """

    rows: np.ndarray
    merge: Callable[[torch.Tensor], torch.Tensor] | None = None
    groups: Mapping[int, np.ndarray] | None = None
    cause: Cause = Cause.SELECTION
    from_tower: Callable[[Sequence[Picture], torch.Tensor], torch.Tensor] | None = None
    lent: np.ndarray | Sequence[int] = ()

    def __post_init__(self) -> None:
        rows = np.asarray(self.rows)
        object.__setattr__(self, "rows", np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64))

    def positions(self, before: np.ndarray) -> np.ndarray:
        """Positions of the rows that go on, given those of all that are there; -1 for one that stands for no patch."""
        return np.where(np.isin(self.rows, self.lent), -1, before[self.rows])


LEAVE = Keep(np.empty(0, dtype=np.int64), cause=Cause.EXIT)
"""All visual rows leave."""


def keep_best(scores: np.ndarray, count: int) -> Keep:
    """Keep the `count` rows of the largest scores in row order; ties go to the lower position."""
    return Keep(np.sort(np.argsort(-scores, kind="stable")[: max(count, 0)]))
