"""VisionZip: what the class token attends to, and the rest merged into a few rows (arXiv 2412.04467)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from ..by_picture import ByPicture, each_picture
from ..decisions import Keep
from ..errors import PruningConfigError
from ..knobs import Integer, knob
from ..method import register
from ..tower import Picture


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(ByPicture):
    """A picture's rows become its class token, the patches it attends to most, and a few that stand for all others.

    Of the other patches, in raster order, every n-th is a target, and each of the rest goes to the target with the most
    similar keys. A target's row is its state plus the mean state of what went to it, as published; all states are those
    before the projector.

    Attributes:
        dominant: rows for the class token and the patches attended to most, at least 1 and at most an image's patches.
        contextual: targets, at most as many as there are other patches. All rows together are never more than before.
    """

    dominant: int = knob(Integer(least=1), 54)
    contextual: int = knob(Integer(), 10)

    def look(self, picture, rows):
        count = len(picture)
        if self.dominant > count:
            raise PruningConfigError(
                f"pruning config: 'dominant' is {self.dominant}; it must be at most {count}, the patches of an image"
            )
        attention = picture.class_weights.sum(0)
        order = attention.argsort(descending=True, stable=True)
        others = order[self.dominant - 1 :].sort().values
        # The class token's row takes the place of a patch that goes, so one of them is no target.
        contextual = min(self.contextual, len(others) - 1)
        dominant = torch.ones_like(attention).index_fill_(0, others, 0)
        target = torch.full_like(attention, -1)
        if contextual:
            targets = others[:: max(1, len(others) // contextual)][:contextual]
            keys = functional.normalize(picture.keys[:, 1:].float().mean(0), dim=-1)
            nearest = picture.product(keys[others], keys[targets].T).argmax(dim=1)
            target[others] = targets[nearest].float()
            target[targets] = targets.float()
        return {"attention": attention, "dominant": dominant, "target": target}

    def decide(self, layer, measured, trace):
        if not measured:
            return None
        rows: list[int] = []
        lent: list[int] = []
        groups: dict[int, np.ndarray] = {}
        parts: list[tuple[np.ndarray, ...]] = []
        for start, own in each_picture(measured):
            dominant, target = np.flatnonzero(own["dominant"]), own["target"].astype(np.int64)
            targets = np.unique(target[target >= 0])
            place = np.setdiff1d(np.arange(len(target)), [*dominant, *targets])[0]
            rows += [start + place, *(start + dominant), *(start + targets)]
            lent.append(start + place)
            groups |= {int(start + one): start + np.flatnonzero(target == one) for one in targets}
            parts.append((dominant, targets, target))

        def zipped(pictures: Sequence[Picture]) -> torch.Tensor:
            return torch.cat([_zipped_rows(picture, *own) for picture, own in zip(pictures, parts, strict=True)])

        return Keep(np.array(rows), groups=groups, from_tower=zipped, lent=lent)


def _zipped_rows(picture: Picture, dominant: np.ndarray, targets: np.ndarray, target: np.ndarray) -> torch.Tensor:
    """`[rows, hidden_size]`: the class token's row, those of `dominant`, and those of `targets` with what they got."""
    states = picture.states
    goes = (target == targets[:, None]) & (targets[:, None] != np.arange(len(target)))  # [targets, patches]
    shares = torch.from_numpy(goes / np.maximum(goes.sum(1, keepdims=True), 1)).to(states.device, torch.float32)
    kept = torch.from_numpy(np.concatenate([[0], 1 + dominant])).to(states.device)
    merged = states[torch.from_numpy(1 + targets).to(states.device)] + picture.product(shares, states[1:].float())
    return picture.project(torch.cat([states[kept], merged.to(states.dtype)]))
