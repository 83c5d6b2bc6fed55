"""What the vision tower made of an image, for methods that choose before the decoder.

A hook at the tower's layer that the language model reads keeps that layer's input and output while a call lasts.
Attention and keys are computed from them when a method asks: of the class token's row (CLIP), or, in a tower that has
none (SigLIP), of all rows, a few at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .attention import SCORE_CHUNK
from .errors import UnsupportedCallError
from .trace import PruningTrace
from .varlen import to_device


@dataclass(frozen=True)
class Tiles:
    """How the crops of one image lie among its rows.

    Attributes:
        count: crops of the image.
        size: patches of a crop.
        patches: int64, for each of its rows the patch that it shows, counted through all crops; -1: it ends a line.
    """

    count: int
    size: int
    patches: np.ndarray


@dataclass(frozen=True)
class Crop:
    """One crop of an image, as the prompt has it. Patches that show padding may have no row.

    Attributes:
        image: number of its image in the prompt, from 0.
        of: crops of that image.
        rows: int64, ascending, which of the prompt's visual rows show its patches.
        patches: int64, which of its patches these are.
    """

    image: int
    of: int
    rows: np.ndarray
    patches: np.ndarray


def crops_of(traces: Sequence[PruningTrace], tiles: Sequence[Tiles]) -> list[list[Crop]] | None:
    """The crops of every prompt, in order; None where `tiles`, those of all images, do not fit the prompts' rows."""
    prompts, images = [], iter(tiles)
    for trace in traces:
        crops: list[Crop] = []
        start = number = 0
        while start < trace.num_visual:
            if (image := next(images, None)) is None:
                return None
            of = np.where(image.patches < 0, -1, image.patches // image.size)
            for crop in range(image.count):
                rows = np.flatnonzero(of == crop)
                crops.append(Crop(number, image.count, rows + start, image.patches[rows] % image.size))
            start, number = start + len(image.patches), number + 1
        if start > trace.num_visual:
            return None
        prompts.append(crops)
    return prompts if next(images, None) is None else None


class Picture:
    """One crop of an image as a CLIP-style tower sees it: a class token (in row 0, if the tower has one) and N patches.

    Patches that have no row in the prompt are left out of everything but the softmax of the attention.

    Attributes:
        has_class: whether there is a class token.
        crop: which of the prompt's rows are its patches; None: all, of one image.
        flops: of the products that were made here for a method, two a multiply-add.
    """

    def __init__(
        self,
        layer: Any,
        projector: nn.Module,
        entering: torch.Tensor,
        states: torch.Tensor,
        has_class: bool = True,
        crop: Crop | None = None,
    ):
        self._layer, self._projector, self._entering = layer, projector, entering
        self._states, self.has_class = states, has_class
        every = np.arange(len(states) - has_class)
        self.crop = crop or Crop(0, 1, every, every)
        self.flops = 0

    def __len__(self) -> int:
        """N, the patches."""
        return len(self.crop.patches)

    @property
    def size(self) -> int:
        """Patches of the crop, those that have no row among them."""
        return len(self._states) - self.has_class

    def _shown(self, rows: torch.Tensor) -> torch.Tensor:
        """Of all rows of the tower `[..., rows, size]`, the patches that have a row in the prompt."""
        patches = rows[..., int(self.has_class) :, :]
        if len(self) == patches.shape[-2]:
            return patches
        return patches.index_select(-2, to_device(torch.from_numpy(self.crop.patches), torch.int64, rows.device))

    @cached_property
    def states(self) -> torch.Tensor:
        """`[N, hidden]`, the patches in the output of the layer that the projector reads."""
        return self._shown(self._states)

    @property
    def class_state(self) -> torch.Tensor:
        """`[1, hidden]`, the class token in that output; `[0, hidden]` without one."""
        return self._states[: int(self.has_class)]

    @cached_property
    def keys(self) -> torch.Tensor:
        """The patches' keys of that layer, `[heads, N, head_dim]`."""
        return self._shown(self._every_key)

    @cached_property
    def attention(self) -> torch.Tensor:
        """What the class token puts on the patches, float32 `[heads, N]`, after a softmax over all rows. Without one:
        what each patch is given on average by all."""
        asking = self._normed[:1] if self.has_class else self._normed
        query, keys = self._heads("q_proj", asking).float(), self._every_key.float().transpose(1, 2)
        given = torch.zeros_like(keys[:, 0])
        for some in query.split(max(SCORE_CHUNK // (keys.shape[0] * keys.shape[2]), 1), dim=1):
            scores = self.product(some, keys) * self._layer.self_attn.scale
            given += torch.softmax(scores, dim=-1).sum(1)
        return self._shown(given[..., None] / len(asking))[..., 0]

    def similarity(self) -> torch.Tensor:
        """Cosines of the patches' states, float32 `[N, N]`."""
        directions = functional.normalize(self.states.float(), dim=-1)
        return self.product(directions, directions.T)

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """Rows of the decoder from states of that layer, merged or not, `[rows, hidden]`."""
        linear = [part for part in self._projector.modules() if isinstance(part, nn.Linear)]
        self.flops += 2 * len(states) * sum(part.in_features * part.out_features for part in linear)
        return self._projector(states)

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`left @ right`, entered into `flops`."""
        result = left @ right
        self.flops += 2 * left.shape[-1] * result.numel()
        return result

    @cached_property
    def _every_key(self) -> torch.Tensor:
        return self._heads("k_proj", self._normed)

    @cached_property
    def _normed(self) -> torch.Tensor:
        return self._layer.layer_norm1(self._entering)

    def _heads(self, name: str, normed: torch.Tensor) -> torch.Tensor:
        attention = self._layer.self_attn
        projected = getattr(attention, name)(normed)
        self.flops += 2 * normed.shape[-1] * projected.numel()
        return projected.unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)


class Mosaic:
    """The crops of one image as one picture, for methods that pool them: patches in the order of their rows.

    Attention is each crop's own.
    """

    def __init__(self, pictures: Sequence[Picture]):
        rows = np.concatenate([picture.crop.rows for picture in pictures])
        order = np.argsort(rows)
        self.crop = Crop(pictures[0].crop.image, 1, rows[order], order)
        self.product = pictures[0].product
        weights = torch.cat([picture.attention for picture in pictures], dim=1)
        self.attention = weights[:, to_device(torch.from_numpy(order), torch.int64, weights.device)]

    def __len__(self) -> int:
        return len(self.crop.rows)


class TowerWatch:
    """Keeps what one tower layer got and gave, until the prefill that it was for takes it."""

    def __init__(self, layer: Any, projector: nn.Module, has_class: bool):
        self._layer, self._projector, self._has_class = layer, projector, has_class
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def install(self) -> Callable[[], None]:
        """Hook the layer; returns what takes the hook off."""
        return self._layer.register_forward_hook(self._after, with_kwargs=True).remove

    def _after(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        self._seen.append((entering, output[0] if isinstance(output, tuple) else output))

    def forget(self) -> None:
        """Drop what no prefill took."""
        self._seen = []

    def take(self, traces: Sequence[PruningTrace], copies: int, tiles: Sequence[Tiles] | None) -> list[list[Picture]]:
        """The pictures of every prompt, in order; forgets them.

        Args:
            traces: of the prompts, `copies` of which are in the batch one behind the other. The tower may have seen
                each picture once, or once a copy.
            tiles: of all images; None: nobody knows, so that an image is one crop with a row for every patch.

        Raises:
            UnsupportedCallError: these do not fit what the tower saw, so that nothing says which crop is whose.
        """
        seen, self._seen = self._seen, []
        pairs = [pair for batch in seen for pair in zip(*batch, strict=True)]
        patches, rows = len(pairs[0][1]) - self._has_class if pairs else 1, sum(trace.num_visual for trace in traces)
        if tiles is None:
            tiles = [Tiles(1, patches, np.arange(patches))] * (rows // patches)
        crops, count = crops_of(traces, tiles), sum(image.count for image in tiles)
        if crops is not None and len(pairs) == count * copies:
            pairs = [pair for image in _by_image(pairs, tiles, copies) for pair in image]
        if crops is None or len(pairs) != count:
            images = sum(len(trace.image_spans) for trace in traces)
            raise UnsupportedCallError(
                f"the vision tower saw {len(pairs)} crops for {images} images of {rows} rows; this method needs "
                "pictures, not rows or videos, and has to know how tiles lie in the prompt: one crop an image and one "
                "row a patch, or tiles of LLaVA-1.6 or OneVision with their image_sizes, not scaled down"
            )
        one_by_one = iter(pairs)
        prompts = [
            [Picture(self._layer, self._projector, *next(one_by_one), self._has_class, crop) for crop in own]
            for own in crops
        ]
        return [[picture for picture in own if len(picture)] for own in prompts]  # not those that show padding alone


def _by_image(pairs: list, tiles: Sequence[Tiles], copies: int) -> Iterator[list]:
    """The crops of the first copy of every image."""
    start = 0
    for image in tiles:
        yield pairs[start : start + image.count]
        start += image.count * copies
