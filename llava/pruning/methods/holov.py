"""HoloV: every stretch of the image keeps its most attended patches, as many as its own share (arXiv 2510.02912)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..by_picture import OF_PICTURE, ByPicture, each_picture
from ..decisions import Keep
from ..knobs import Choice, Count, Integer, knob, refuse
from ..method import number_of, register

ALPHA, EPSILON = 0.09, 1e-6


@register("holov")
@dataclass(frozen=True)
class HoloV(ByPicture):
    """Each picture's patches are cut into runs of their raster order; a run keeps its share of the score by attention.

    A run's score is the mean of its patches' attention and diversity. As published, diversity is scaled to the mean
    attention of the run, so that it is the same factor for all of them and changes nothing.

    Attributes:
        keep: tokens an image, or a share of its patches, rounded half to even.
        crops: runs a picture is cut into.
        overflow: what a run cannot take of its share goes to others (`"redistribute"`), or becomes rows of zeros behind
            the picture's (`"zeros"`, as published).
        order: of the patches that stay, `"raster"`, or run by run by descending attention (`"published"`).
        positions: `"renumber"` (published): the decoder counts the rows that are left from 0. `"keep"`: survivors keep
            their positions.
    """

    keep: int | float = knob(Count(), 64)
    crops: int = knob(Integer(least=1), 16)
    overflow: str = knob(Choice(("redistribute", "zeros")), "redistribute")
    order: str = knob(Choice(("raster", "published")), "raster")
    positions: str = knob(Choice(("renumber", "keep")), "renumber")

    pools_tiles = True

    def __post_init__(self):
        super().__post_init__()
        if self.positions == "keep" and self.order == "published":
            refuse("positions", "keep", "'renumber' with 'order' 'published', which is not that of positions")

    def look(self, picture, rows):
        rows = rows.float()
        directions = rows / (rows.norm(dim=-1, keepdim=True) + EPSILON)
        diversity = []
        for run in directions.tensor_split(min(self.crops, len(picture))):
            others = max(len(run) - 1, 1)
            similar = picture.product(run, run.T).fill_diagonal_(0)
            mean = similar.sum(1, keepdim=True) / others
            diversity.append(((similar - mean) ** 2).sum(1) / others)
        return {"attention": picture.attention.mean(0), "diversity": torch.cat(diversity)}

    def decide(self, layer, measured, trace):
        if not measured:
            return None
        rows: list[int] = []
        lent: list[int] = []
        ends = np.flatnonzero(measured[OF_PICTURE] < 0)  # of the lines of tiles; they stay in their places
        for patches, own in each_picture(measured):
            kept = self._kept(own["attention"], own["diversity"])
            missing = number_of(self.keep, len(patches)) - len(kept)
            # Rows of zeros need a place in the picture, and any patch that leaves has one.
            places = np.setdiff1d(np.arange(len(patches)), kept)[:missing]
            rows += [*patches[kept], *patches[places]]
            lent += [*patches[places]]

        going = np.sort(np.array([*rows, *ends], dtype=np.int64))
        going[~np.isin(going, ends)] = rows

        def zeros_behind(states: torch.Tensor) -> torch.Tensor:
            stays = torch.from_numpy(~np.isin(going, lent)).to(states)
            return states[torch.from_numpy(going).to(states.device)] * stays[:, None]

        return Keep(going, zeros_behind if lent else None, lent=lent)

    def _kept(self, attention: np.ndarray, diversity: np.ndarray) -> np.ndarray:
        """The patches of one picture that stay, in their order."""
        count = number_of(self.keep, len(attention))
        runs = np.array_split(np.arange(len(attention)), min(self.crops, len(attention)))
        quotas = self._quotas(np.array([_score(1000 * attention[run], diversity[run]) for run in runs]), runs, count)
        kept = []
        for run, quota in zip(runs, quotas, strict=True):
            best = run[np.argsort(-attention[run], kind="stable")[:quota]]
            kept.append(run if quota >= len(run) else best)
        joined = np.concatenate(kept)
        return np.sort(joined) if self.order == "raster" else joined

    def _quotas(self, scores: np.ndarray, runs: list[np.ndarray], count: int) -> np.ndarray:
        """How many patches each run keeps."""
        weights = scores / (scores.sum() + EPSILON)
        quotas = np.floor(weights * count).astype(np.int64)
        ranked, room = np.argsort(-weights, kind="stable"), np.array([len(run) for run in runs])
        for turn in range(count - quotas.sum()):
            quotas[ranked[turn % len(ranked)]] += 1
        quotas = np.minimum(quotas, room)
        while self.overflow == "redistribute" and quotas.sum() < count:
            free = ranked[(quotas < room)[ranked]][: count - quotas.sum()]
            quotas[free] += 1
        return quotas


def _score(attention: np.ndarray, diversity: np.ndarray) -> float:
    scaled = ALPHA * diversity * np.abs(attention).mean() / (np.abs(diversity).mean() + EPSILON)
    return float((attention + scaled).mean())
