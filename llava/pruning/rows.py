"""Which rows of a prompt a layer processes, and which of them came from an image."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from .varlen import to_device


class Rows:
    """The rows of one sample that are still there. Indices are local: row 0 is the first of them.

    Attributes:
        count: rows in all.
        num_prompt: rows of the prompt; the rest are draft tokens (assisted decoding), which come last.
        visual: local indices of the visual rows, ascending.
        positions: positions of the visual rows in the unpruned prompt, in their order.
    """

    def __init__(self, count: int, num_prompt: int, visual: np.ndarray, positions: np.ndarray):
        self.count = count
        self.num_prompt = num_prompt
        self.visual = visual
        self.positions = positions
        self._indices: dict[tuple[str, torch.device], torch.Tensor] = {}

    @classmethod
    def of_prompt(cls, visual_mask: np.ndarray, num_drafts: int) -> Rows:
        """All rows of a prompt. `visual_mask`: [rows], not 0 on visual rows, draft rows included."""
        visual = np.flatnonzero(visual_mask)
        return cls(len(visual_mask), len(visual_mask) - num_drafts, visual, visual)

    def without_visual(self) -> Rows:
        """The other rows alone."""
        nothing = np.empty(0, dtype=np.int64)
        return Rows(self.count - len(self.visual), self.num_prompt - len(self.visual), nothing, nothing)

    def keeping(self, kept: np.ndarray) -> tuple[Rows, np.ndarray]:
        """The rows left when of the visual rows only `kept` go on, and which of today's rows each of them was.

        `kept`: int64 indices into `visual`, each once, in the order in which they go on. Together they take the
        places of the kept rows, from first to last.
        """
        places = self.visual[np.sort(kept)]
        survives = np.ones(self.count, dtype=bool)
        survives[self.visual] = False
        survives[places] = True
        source = np.flatnonzero(survives)
        visual = (np.cumsum(survives) - 1)[places]
        source[visual] = self.visual[kept]
        dropped = len(self.visual) - len(kept)
        return Rows(self.count - dropped, self.num_prompt - dropped, visual, self.positions[kept]), source

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """Stretches of visual rows, `(first, behind the last)`."""
        if not len(self.visual):
            return []
        breaks = np.flatnonzero(np.diff(self.visual) > 1)
        firsts = self.visual[np.concatenate(([0], breaks + 1))]
        lasts = self.visual[np.concatenate((breaks, [len(self.visual) - 1]))]
        return [(int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True)]

    @cached_property
    def text(self) -> np.ndarray:
        """Local indices of the prompt's rows that are not visual, the prefix included."""
        return np.setdiff1d(np.arange(self.num_prompt), self.visual, assume_unique=True)

    def text_index(self, device: torch.device) -> torch.Tensor:
        """`text` as int64 on `device`."""
        return self._on_device("text", device)

    def visual_index(self, device: torch.device) -> slice | torch.Tensor:
        """`visual` as a slice where they lie in one stretch, else as int64 on `device`."""
        if len(self.runs) == 1:
            return slice(*self.runs[0])
        return self._on_device("visual", device)

    def _on_device(self, name: str, device: torch.device) -> torch.Tensor:
        key = (name, device)
        if key not in self._indices:
            self._indices[key] = to_device(torch.from_numpy(getattr(self, name)), torch.int64, device)
        return self._indices[key]
