"""`PruningTrace`: what was decided for one prompt, and what its prefill really computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .decisions import Cause


@dataclass(frozen=True)
class Decision:
    """One decision about a prompt's visual rows.

    Attributes:
        layer: the layer behind which it fell; -1: before the decoder.
        cause: why rows left.
        positions: int64, of the visual rows that go on, in their order; a merged row's is that of the row it took
            the place of. Always positions of the unpruned prompt; -1: a row that stands for no patch.
        groups: position of a merged row → positions it stands for.
        measured: what led to it, by name, float32; mostly [visual rows that were there], in row order. Empty for
            decisions that looked at nothing.
        before: int64, positions of the visual rows that were there.
    """

    layer: int
    cause: Cause
    positions: np.ndarray
    groups: Mapping[int, list[int]]
    measured: Mapping[str, np.ndarray]
    before: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`; measures are left out, see `PruningTrace.to_dict`."""
        return {
            "layer": self.layer,
            "cause": self.cause.value,
            "positions": self.positions.tolist(),
            "groups": {str(position): members for position, members in self.groups.items()},
        }


@dataclass
class PruningTrace:
    """One prompt's prefill. Positions and counts are the prompt's own, without its left padding.

    Attributes:
        num_rows: N, rows of the prompt after the image features were spliced in.
        visual_positions: positions of the visual rows, ascending.
        image_spans: where each image lies, `(first row, behind its last)`, in order. Adjacent images of a family
            that gives them different numbers of rows and no text between are one span; so is every tile where
            the family writes text between the tiles of an image.
        decisions: everything that was decided, in order.
        rows_per_layer: rows each layer processed, [L].
        updated_rows_per_layer: those of them that asked and were updated; the others gave keys and values only, [L].
        measured_before: what a method measured at the decoder's input, whether it decided anything there or not; as in
            `Decision`.
        smallest_cosine: the smallest cosine at every layer where a method measured it (VisiPruner's middle and deep
            stages).
        score_pairs, value_pairs: query-key pairs scored and weight-value pairs summed in each layer, summed
            over query heads, those that a method's measures took included, [L]. A call counts its whole rectangle,
            as torch's counter has it.
        projection_flops: FLOPs of projections and products that were made for a method's choice alone.
        visual_rows_read: visual rows whose values the prompt's text rows may read in each layer, [L]: those that
            are there, fewer where the shallow stage hides them.
        lm_head_rows: rows that went through the output head.
    """

    num_rows: int
    visual_positions: list[int]
    image_spans: list[tuple[int, int]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    rows_per_layer: list[int] = field(default_factory=list)
    updated_rows_per_layer: list[int] = field(default_factory=list)
    measured_before: Mapping[str, np.ndarray] = field(default_factory=dict)
    smallest_cosine: dict[int, float] = field(default_factory=dict)
    score_pairs: list[int] = field(default_factory=list)
    value_pairs: list[int] = field(default_factory=list)
    projection_flops: int = 0
    visual_rows_read: list[int] = field(default_factory=list)
    lm_head_rows: int = 1

    @property
    def num_visual(self) -> int:
        """Visual rows of the prompt."""
        return len(self.visual_positions)

    @property
    def alive(self) -> np.ndarray:
        """Positions of the visual rows that the last decision left, int64."""
        return self.decisions[-1].positions if self.decisions else np.asarray(self.visual_positions, dtype=np.int64)

    @property
    def alive_per_image(self) -> list[np.ndarray]:
        """For each of `image_spans`, the indices of its rows in `alive`, int64; images without any are left out."""
        alive = self.alive
        own = [np.flatnonzero((first <= alive) & (alive < stop)) for first, stop in self.image_spans]
        return [rows for rows in own if len(rows)]

    def _last(self, cause: Cause) -> Decision | None:
        return next((decision for decision in reversed(self.decisions) if decision.cause is cause), None)

    @property
    def select_layer(self) -> int | None:
        """The layer behind which the kept rows were chosen, the last where there were several; -1: before the
        decoder; None: no selection happened."""
        selection = self._last(Cause.SELECTION)
        return selection.layer if selection else None

    @property
    def kept_positions(self) -> list[int]:
        """Positions that the last selection kept, ascending; empty where nothing was selected or kept."""
        selection = self._last(Cause.SELECTION)
        return sorted(position for position in selection.positions.tolist() if position >= 0) if selection else []

    @property
    def exit_layer(self) -> int | None:
        """First layer that runs without the rows that were left; None: they stayed to the end."""
        leaving = self._last(Cause.EXIT)
        return leaving.layer + 1 if leaving else None

    @property
    def selection_cosine(self) -> np.ndarray | None:
        """The cosines of the last selection, see `selection_measure`."""
        return self.selection_measure("cosine")

    @property
    def selection_norm(self) -> np.ndarray | None:
        """The norms of the last selection, see `selection_measure`."""
        return self.selection_measure("norm")

    def selection_measure(self, name: str) -> np.ndarray | None:
        """What the last selection measured under `name`: float32 [num_visual], an entry for each of
        `visual_positions`, NaN for rows that had left before; None where it measured no such thing."""
        selection = self._last(Cause.SELECTION)
        if selection is None or name not in selection.measured:
            return None
        spread = np.full(self.num_visual, np.nan, dtype=np.float32)
        of_patches = selection.before >= 0
        places = np.searchsorted(self.visual_positions, selection.before[of_patches])
        spread[places] = selection.measured[name][of_patches]
        return spread

    @property
    def num_kept(self) -> int:
        """Visual rows left after selection; all of them where nothing was selected or removed."""
        selection = self._last(Cause.SELECTION)
        if selection is None and self.exit_layer is None:
            return self.num_visual
        return len(selection.positions) if selection else 0

    @property
    def kept_per_image(self) -> list[int]:
        """Kept rows in each of `image_spans`."""
        return [sum(first <= kept < stop for kept in self.kept_positions) for first, stop in self.image_spans]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for `json.dumps`."""
        cosine, norm = self.selection_cosine, self.selection_norm
        return {
            "num_rows": self.num_rows,
            "visual_positions": list(self.visual_positions),
            "image_spans": list(self.image_spans),
            "select_layer": self.select_layer,
            "kept_positions": self.kept_positions,
            "exit_layer": self.exit_layer,
            "rows_per_layer": list(self.rows_per_layer),
            "selection_cosine": None if cosine is None else cosine.tolist(),
            "selection_norm": None if norm is None else norm.tolist(),
            "smallest_cosine": {str(layer): value for layer, value in self.smallest_cosine.items()},
            "score_pairs": list(self.score_pairs),
            "value_pairs": list(self.value_pairs),
            "visual_rows_read": list(self.visual_rows_read),
            "lm_head_rows": self.lm_head_rows,
            "kept_per_image": self.kept_per_image,
            "updated_rows_per_layer": list(self.updated_rows_per_layer),
            "projection_flops": self.projection_flops,
            "decisions": [decision.to_dict() for decision in self.decisions],
        }
