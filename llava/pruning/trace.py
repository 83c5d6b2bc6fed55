"""`PruningTrace`: what was decided for one prompt, and what its prefill really computed."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np


@dataclass
class PruningTrace:
    """One prompt's prefill. Positions and counts are the prompt's own, without its left padding.

    Attributes:
        num_rows: N, rows of the prompt after the image features were spliced in.
        visual_positions: positions of the visual rows, ascending.
        image_spans: where each image lies, `(first row, behind its last)`, in order. Adjacent images of a family
            that gives them different numbers of rows and no text between are one span; so is every tile where
            the family writes text between the tiles of an image.
        select_layer: layer whose attention chose the kept tokens; None: no selection happened.
        kept_positions: positions that were kept, ascending; empty where nothing was selected or kept.
        exit_layer: first layer that runs without the rows that were left; None: they stayed to the end.
        rows_per_layer: rows each layer processed, [L].
        selection_cosine, selection_norm: float32 [num visual rows], the probe at the selecting layer, an entry
            for each of `visual_positions`; None without a probed selection.
        smallest_cosine: the smallest cosine at every layer that was probed.
        score_pairs, value_pairs: query-key pairs scored and weight-value pairs summed in each layer, summed
            over query heads, the probe's included, [L]. A call counts its whole rectangle, as torch's counter
            has it.
        visual_rows_read: visual rows whose values the prompt's text rows may read in each layer, [L]: those that
            are there, fewer where the shallow stage hides them.
        lm_head_rows: rows that went through the output head.
    """

    num_rows: int
    visual_positions: list[int]
    image_spans: list[tuple[int, int]] = field(default_factory=list)
    select_layer: int | None = None
    kept_positions: list[int] = field(default_factory=list)
    exit_layer: int | None = None
    rows_per_layer: list[int] = field(default_factory=list)
    selection_cosine: np.ndarray | None = None
    selection_norm: np.ndarray | None = None
    smallest_cosine: dict[int, float] = field(default_factory=dict)
    score_pairs: list[int] = field(default_factory=list)
    value_pairs: list[int] = field(default_factory=list)
    visual_rows_read: list[int] = field(default_factory=list)
    lm_head_rows: int = 1

    @property
    def num_visual(self) -> int:
        """Visual rows of the prompt."""
        return len(self.visual_positions)

    @property
    def num_kept(self) -> int:
        """Visual rows left after selection; all of them where nothing was selected or removed."""
        if self.select_layer is None and self.exit_layer is None:
            return self.num_visual
        return len(self.kept_positions)

    @property
    def kept_per_image(self) -> list[int]:
        """Kept rows in each of `image_spans`."""
        return [sum(first <= kept < stop for kept in self.kept_positions) for first, stop in self.image_spans]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for `json.dumps`."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        for key, value in plain.items():
            if isinstance(value, np.ndarray):
                plain[key] = value.tolist()
            elif isinstance(value, list):
                plain[key] = list(value)
        plain["smallest_cosine"] = {str(layer): value for layer, value in self.smallest_cosine.items()}
        plain["kept_per_image"] = self.kept_per_image
        return plain
