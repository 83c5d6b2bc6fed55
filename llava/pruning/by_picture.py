"""What methods share that choose before the decoder, picture by picture, from what the vision tower made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from .decisions import BEFORE_DECODER, Keep
from .method import Method
from .tower import Picture

OF_PICTURE = "picture"
"""The measure that says which picture of its prompt a row is of."""


class ByPicture(Method):
    """A method that looks at each picture by itself. The prompt gets shorter, so its rows are numbered anew."""

    needs_tower = True
    renumbers = True  # type: ignore[assignment]  # whatever its knobs

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
        rows = view.hidden[view.visual].split([len(picture) for picture in view.pictures])
        seen = [self.look(picture, own) for picture, own in zip(view.pictures, rows, strict=True)]
        measured = {name: torch.cat([each[name] for each in seen]) for name in seen[0]}
        numbers = [torch.full_like(own[:, 0], number, dtype=torch.float32) for number, own in enumerate(rows)]
        return {**measured, OF_PICTURE: torch.cat(numbers).to(next(iter(measured.values())).device)}

    def decide(self, layer, measured, trace):
        return Keep(measured["kept"] > 0) if measured else None


def each_picture(measured: Mapping[str, np.ndarray]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Where each picture's rows begin among those of the prompt, and its own measures, `[N]` each."""
    starts = [0, *(np.flatnonzero(np.diff(measured[OF_PICTURE])) + 1)]
    pieces = {name: np.split(part, starts[1:]) for name, part in measured.items()}
    for number, start in enumerate(starts):
        yield int(start), {name: parts[number] for name, parts in pieces.items()}
