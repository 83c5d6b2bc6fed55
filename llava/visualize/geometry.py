"""Where on the picture a visual row looks: through padding, cropping and anyres tiles, back to the original.

Every preparation of `llava.mm_utils.process_images`, and of transformers' own processors, is a chain of shifts and
scalings, so that a patch of the vision tower covers one upright box of the original picture. The box may reach over
the picture's edge (padding) or lie wholly outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava.mm_utils import (
    Size,
    get_anyres_image_grid_shape,
    grid_pinpoints,
    letterbox,
    processor_shortest_edge,
    select_best_resolution,
    square_offset,
    unpadded_box,
)
from llava.model.llava_arch import merge_type
from llava.pruning.geometry import PatchGrid, View, cropped_box
from llava.serve.chat import Checkpoint, Picture, Prompt
from llava.serve.stock_chat import StockCheckpoint


@dataclass(frozen=True)
class PatchMap:
    """Boxes of one picture's rows, in the order of the rows.

    Attributes:
        picture_size: (width, height) of the original picture in pixels.
        boxes: float64 [rows, 4]: left, top, right, bottom in pixels of the original picture; NaN for rows that show
            no part of it (newline rows, a class token).
        views: [rows], `"whole"` or `"tiles"`; "" for rows without a box.
    """

    picture_size: Size
    boxes: np.ndarray
    views: np.ndarray

    @property
    def on_picture(self) -> np.ndarray:
        """Rows whose box overlaps the picture, bool [rows]; the others show padding or nothing."""
        width, height = self.picture_size
        left, top, right, bottom = self.boxes.T
        # Comparisons with NaN are false.
        return (right > 0) & (bottom > 0) & (left < width) & (top < height)

    @property
    def is_known(self) -> bool:
        """Whether it is known where rows look; else no row has a box."""
        return not np.isnan(self.boxes).all()

    @property
    def has_tiles(self) -> bool:
        """Whether the picture was cut into anyres tiles."""
        return bool((self.views == "tiles").any())

    def rows_at(self, x: float, y: float) -> np.ndarray:
        """Rows whose box holds the point (x, y), in pixels of the original picture."""
        left, top, right, bottom = self.boxes.T
        return np.flatnonzero((left <= x) & (x < right) & (top <= y) & (y < bottom))

    def heatmap(self, scores: np.ndarray, view: View | None = None, resolution: int = 336) -> np.ndarray:
        """Scores of the rows painted where the rows look.

        Args:
            scores: [rows].
            view: only rows of this view; None: all, added where two views overlap.
            resolution: cells along the picture's longer side, for a picture that is longer; never more than its
                pixels.

        Returns:
            float64 [height, width] of the picture's aspect ratio; 0 where no row looks.
        """
        scores = np.asarray(scores, dtype=np.float64)
        if scores.shape != (len(self.boxes),):
            raise ValueError(f"scores have shape {scores.shape}; one for each of {len(self.boxes)} rows is needed")
        width, height = self.picture_size
        scale = min(1.0, resolution / max(width, height))
        canvas = np.zeros((max(1, round(height * scale)), max(1, round(width * scale))))
        shown = self.on_picture if view is None else self.on_picture & (self.views == view)
        # A cell belongs to the box that holds its centre.
        xs = (np.arange(canvas.shape[1]) + 0.5) * width / canvas.shape[1]
        ys = (np.arange(canvas.shape[0]) + 0.5) * height / canvas.shape[0]
        for row in np.flatnonzero(shown):
            left, top, right, bottom = self.boxes[row]
            columns = slice(*np.searchsorted(xs, (left, right)))
            lines = slice(*np.searchsorted(ys, (top, bottom)))
            canvas[lines, columns] += scores[row]
        return canvas


def patch_maps(checkpoint: Checkpoint, prompt: Prompt, pictures: Sequence[Picture]) -> list[PatchMap]:
    """The boxes of every picture's rows in a prompt of any checkpoint.

    Args:
        checkpoint: what made the prompt.
        prompt: from its `encode`.
        pictures: all pictures of the prompt, in order.

    Returns:
        A map a picture, whose rows together are the prompt's visual rows. Where it is not known how a family lays
        its rows out, one map for all, without boxes (`PatchMap.is_known`).
    """
    sizes = [picture.image.size for picture in pictures]
    if not isinstance(checkpoint, StockCheckpoint):
        side = checkpoint.num_patches_per_side
        return [patch_map(size, checkpoint.image_processor, checkpoint.config, side) for size in sizes]
    grids = checkpoint.patch_grids(prompt, sizes)
    if grids is None:
        nowhere = np.full((prompt.num_visual, 4), np.nan)
        return [PatchMap(size, nowhere, np.full(len(nowhere), "")) for size in sizes[-1:]]
    return [map_of_grids(size, own) for size, own in zip(sizes, grids, strict=True)]


def kept_in_words(kept: np.ndarray) -> str:
    """Kept rows of a picture that cannot be drawn on it, by number. `kept`: bool [visual rows]."""
    numbers = np.flatnonzero(kept).tolist()
    listed = ", ".join(map(str, numbers)) if numbers else "none"
    return f"where this model's visual tokens lie in the picture is not known; kept, of {len(kept)}: {listed}"


def map_of_grids(picture_size: Size, grids: Sequence[PatchGrid]) -> PatchMap:
    """The boxes of one picture's rows from the grids that a family's adapter tells of."""
    return _as_map(picture_size, [(_grid_boxes(picture_size, grid), grid.view) for grid in grids])


def _grid_boxes(picture_size: Size, grid: PatchGrid) -> np.ndarray:
    """[lines · columns, 4], with rows of NaN for newlines."""
    left, top, right, bottom = np.multiply(grid.box, np.tile(picture_size, 2))
    boxes = _cells(np.linspace(left, right, grid.columns + 1), np.linspace(top, bottom, grid.lines + 1))
    if grid.newline:
        boxes = np.concatenate([boxes, np.full((grid.lines, 1, 4), np.nan)], axis=1)
    return boxes.reshape(-1, 4)


def patch_map(picture_size: Size, image_processor: Any, config: Any, num_patches_per_side: int) -> PatchMap:
    """The boxes of a picture's rows, as `process_images` prepares it and the splice lays it out.

    Args:
        picture_size: (width, height) of the original picture.
        image_processor: the model's CLIP image processor.
        config: the model's config (`image_aspect_ratio`, `image_grid_pinpoints`, `mm_patch_merge_type`,
            `mm_vision_select_feature`).
        num_patches_per_side: patches along one side of the vision tower's input.
    """
    side = num_patches_per_side
    has_class_token = getattr(config, "mm_vision_select_feature", "patch") == "cls_patch"
    aspect = getattr(config, "image_aspect_ratio", None)
    if aspect == "anyres":
        return _anyres_map(picture_size, image_processor, config, side, has_class_token)
    if aspect == "pad":
        square = max(picture_size)
        boxes = _processed_boxes((square, square), image_processor, side)
        boxes -= np.tile(square_offset(picture_size), 2)
    else:
        boxes = _processed_boxes(picture_size, image_processor, side)
    return _as_map(picture_size, [(_with_class_token(boxes) if has_class_token else boxes, "whole")])


def _anyres_map(size: Size, processor: Any, config: Any, side: int, has_class_token: bool) -> PatchMap:
    width, height = size
    # The whole picture is squeezed into a square before the processor sees it.
    squeezed = processor_shortest_edge(processor)
    whole = _processed_boxes((squeezed, squeezed), processor, side)
    whole *= np.tile((width / squeezed, height / squeezed), 2)

    tile = processor.crop_size["height"]
    columns, rows = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tile)
    grid = select_best_resolution(size, grid_pinpoints(config.image_grid_pinpoints))
    left, top, fitted_width, fitted_height = letterbox(size, grid)
    cells = _processed_boxes((tile, tile), processor, side).reshape(1, 1, side, side, 4)
    origins = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1) * tile  # [rows, columns, (x, y)]
    tiles = cells + np.tile(origins, 2)[:, :, None, None, :]  # [rows, columns, side, side, 4]
    tiles = (tiles - np.tile((left, top), 2)) * np.tile((width / fitted_width, height / fitted_height), 2)

    kind = merge_type(config)
    if kind == "flat":
        parts = [whole, *tiles.reshape(rows * columns, side * side, 4)]
        if has_class_token:
            parts = [_with_class_token(part) for part in parts]
        return _as_map(size, [(part, "tiles" if number else "whole") for number, part in enumerate(parts)])
    lines = tiles.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 4)
    if kind == "spatial_unpad":
        first_column, first_line, last_column, last_line = unpadded_box(size, (columns * side, rows * side))
        lines = lines[first_line:last_line, first_column:last_column]
        lines = np.concatenate([lines, np.full((len(lines), 1, 4), np.nan)], axis=1)
    return _as_map(size, [(whole, "whole"), (lines.reshape(-1, 4), "tiles")])


def _processed_boxes(size: Size, processor: Any, side: int) -> np.ndarray:
    """Boxes [side · side, 4] of the tower's patches on what goes into the processor (resize, then centre crop)."""
    return _grid_boxes(size, PatchGrid(side, side, cropped_box(processor, size)))


def _cells(xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Boxes between the lines of a grid: float [len(ys) - 1, len(xs) - 1, 4]."""
    left, top = np.meshgrid(xs[:-1], ys[:-1])
    right, bottom = np.meshgrid(xs[1:], ys[1:])
    return np.stack([left, top, right, bottom], axis=-1)


def _with_class_token(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.full((1, 4), np.nan), boxes])


def _as_map(size: Size, parts: list[tuple[np.ndarray, View]]) -> PatchMap:
    boxes = np.concatenate([part for part, _ in parts])
    views = np.concatenate([np.where(np.isnan(part[:, 0]), "", view) for part, view in parts])
    return PatchMap(size, boxes, views)
