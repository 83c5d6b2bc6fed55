"""What methods share that choose before the decoder, picture by picture, from what the vision tower made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

import numpy as np
import torch

from .decisions import BEFORE_DECODER, Keep
from .method import Method
from .tower import Mosaic, Picture
from .varlen import to_device

OF_PICTURE, OF_IMAGE = "picture", "image"
"""Measures that say which picture and which image of its prompt a row is of; -1 on rows that end a line of tiles."""


class ByPicture(Method):
    """A method that looks at each picture by itself.

    A picture is a crop, so of an image in tiles the whole and each tile are chosen among by themselves. Patches that
    show padding have no row and are no candidates; rows that end a line of tiles stay.

    Attributes:
        pools_tiles: whether the crops of an image are one picture instead.
    """

    needs_tower = True
    pools_tiles = False

    def looks_behind(self, num_layers):
        return {BEFORE_DECODER}

    def look(self, picture: Picture, rows: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Named float32 measures `[N]` of one picture's patches.

        A method without a `decide` of its own names `"kept"`: above 0 on those that stay.

        Args:
            picture: what the tower made of it.
            rows: `[N, hidden_size]`, what the decoder would get.
        """
        raise NotImplementedError

    def measure(self, view):
        rows = view.hidden[view.visual]
        pictures = view.pictures
        if self.pools_tiles:
            pictures = [Mosaic(list(own)) for _, own in groupby(pictures, lambda picture: picture.crop.image)]
        measured: dict[str, torch.Tensor] = {}
        for number, picture in enumerate(pictures):
            index = to_device(torch.from_numpy(picture.crop.rows), torch.int64, rows.device)
            seen = self.look(picture, rows[index])
            counted = {OF_PICTURE: number, OF_IMAGE: picture.crop.image}
            numbers = {name: torch.full_like(index, value, dtype=torch.float32) for name, value in counted.items()}
            for name, part in {**seen, **numbers}.items():
                blank = rows.new_full((len(rows),), -1 if name in numbers else 0, dtype=torch.float32)
                measured.setdefault(name, blank).index_copy_(0, index, part.to(rows.device))
        return measured

    def decide(self, layer, measured, trace):
        return Keep((measured["kept"] > 0) | (measured[OF_PICTURE] < 0)) if measured else None


def each_picture(measured: Mapping[str, np.ndarray]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """For each picture, which of the prompt's visual rows are its patches, and its own measures, `[N]` each."""
    numbers = measured[OF_PICTURE].astype(np.int64)
    for number in range(numbers.max() + 1):
        rows = np.flatnonzero(numbers == number)
        yield rows, {name: part[rows] for name, part in measured.items()}
