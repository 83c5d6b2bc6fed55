"""VisionZip: what the class token attends to, and the rest merged into a few rows (arXiv 2412.04467)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from ..by_picture import OF_IMAGE, OF_PICTURE, ByPicture, each_picture
from ..decisions import Keep
from ..errors import PruningConfigError
from ..knobs import Integer, knob
from ..method import register
from ..tower import Picture
from ..varlen import to_device


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(ByPicture):
    """A picture's rows become its class token, the patches it attends to most, and a few that stand for all others.

    Of the other patches, in raster order, every n-th is a target, and each of the rest goes to the target with the most
    similar keys. A target's row is its state plus the mean state of what went to it, as published; all states are those
    before the projector. Of an image in tiles every crop is zipped by itself: the rows of the whole come first, then
    what the tiles keep as it lies in the image with the rows that end its lines, their class tokens, and their targets.
    In a tower without a class token, attention is what a patch receives, and all rows stay in their places.

    Attributes:
        dominant: of each crop, rows for the class token and the patches attended to most, at least 1 and at most a
            crop's patches, of which a tile that shows padding may have fewer.
        contextual: targets, at most as many as there are other patches. All rows together are never more than before.
    """

    dominant: int = knob(Integer(least=1), 54)
    contextual: int = knob(Integer(), 10)

    renumbers = True  # type: ignore[assignment]  # merged rows have no place of their own

    def look(self, picture, rows):
        if self.dominant > picture.size:
            raise PruningConfigError(
                f"pruning config: 'dominant' is {self.dominant}; it must be at most {picture.size}, the patches of an "
                "image"
            )
        dominant = min(self.dominant, len(picture))
        attention = picture.attention.sum(0)
        order = attention.argsort(descending=True, stable=True)
        others = order[dominant - picture.has_class :].sort().values
        # The class token's row takes the place of a patch that goes, so one of them is no target.
        contextual = min(self.contextual, len(others) - picture.has_class)
        is_dominant = torch.ones_like(attention).index_fill_(0, others, 0)
        target = torch.full_like(attention, -1)
        if contextual:
            targets = others[:: max(1, len(others) // contextual)][:contextual]
            keys = functional.normalize(picture.keys.float().mean(0), dim=-1)
            nearest = picture.product(keys[others], keys[targets].T).argmax(dim=1)
            target[others] = targets[nearest].float()
            target[targets] = targets.float()
        has_class = torch.full_like(attention, picture.has_class)
        return {"attention": attention, "dominant": is_dominant, "target": target, "class": has_class}

    def decide(self, layer, measured, trace):
        if not measured:
            return None
        parts: list[tuple[np.ndarray, ...]] = []
        lent: list[int] = []
        groups: dict[int, np.ndarray] = {}
        # Of every row that is made: its image; the first crop's rows (0), what the others keep as it lies in the image
        # (1), their class tokens (2), their targets (3); and the row whose place it takes.
        made: list[tuple[int, int, int]] = []
        for patches, own in each_picture(measured):
            image = int(own[OF_IMAGE][0])
            dominant, target = np.flatnonzero(own["dominant"]), own["target"].astype(np.int64)
            targets = np.unique(target[target >= 0])
            goes = patches[np.setdiff1d(np.arange(len(target)), [*dominant, *targets])]
            class_row = goes[: int(own["class"][0])].tolist()
            lent += class_row
            groups |= {int(patches[one]): patches[target == one] for one in targets}
            parts.append((dominant, targets, target))
            sections = [2] * len(class_row) + [1] * len(dominant) + [3] * len(targets)
            if not class_row:  # nothing but patches, and all of them in their places
                sections = [1] * len(sections)
            elif not made or made[-1][0] != image:
                sections = [0] * len(sections)
            rows = [*class_row, *patches[dominant], *patches[targets]]
            made += [(image, section, row) for section, row in zip(sections, rows, strict=True)]
        ends = np.flatnonzero(measured[OF_PICTURE] < 0)  # of the lines of tiles
        of_image = np.maximum.accumulate(measured[OF_IMAGE]).astype(np.int64)
        made += [(int(of_image[end]), 1, int(end)) for end in ends]
        order = sorted(range(len(made)), key=lambda one: (*made[one][:2], made[one][2] if made[one][1] == 1 else 0))

        def zipped(pictures: Sequence[Picture], states: torch.Tensor) -> torch.Tensor:
            zipped = [_zipped_rows(picture, *own) for picture, own in zip(pictures, parts, strict=True)]
            as_it_was = states[to_device(torch.from_numpy(ends), torch.int64, states.device)]
            together = torch.cat([*zipped, as_it_was.to(zipped[0])])
            return together[to_device(torch.tensor(order), torch.int64, together.device)]

        return Keep(np.array([made[one][2] for one in order]), groups=groups, from_tower=zipped, lent=lent)


def _zipped_rows(picture: Picture, dominant: np.ndarray, targets: np.ndarray, target: np.ndarray) -> torch.Tensor:
    """`[rows, hidden_size]`: the class token's row if there is one, those of `dominant`, and those of `targets` with
    what they got."""
    states = picture.states
    goes = (target == targets[:, None]) & (targets[:, None] != np.arange(len(target)))  # [targets, patches]
    shares = torch.from_numpy(goes / np.maximum(goes.sum(1, keepdims=True), 1)).to(states.device, torch.float32)
    kept = states[torch.from_numpy(dominant).to(states.device)]
    merged = states[torch.from_numpy(targets).to(states.device)] + picture.product(shares, states.float())
    return picture.project(torch.cat([picture.class_state, kept, merged.to(states.dtype)]))
