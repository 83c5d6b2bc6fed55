"""Where on the picture a visual row looks: through padding, cropping and anyres tiles, back to the original.

Every preparation of `llava.mm_utils.process_images`, and of transformers' own processors, is a chain of shifts and
scalings, so that a patch of the vision tower covers one upright box of the original picture. The box may reach over
the picture's edge (padding) or lie wholly outside. transformers' families cut a picture into one grid of patches or
several; a family's layout reads the grids off what its processor gave and the settings it used, so that pictures of
kept rows need no run of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import numpy as np

from llava.inference import Checkpoint, LlavaCheckpoint, Prompt
from llava.mm_utils import (
    Size,
    get_anyres_image_grid_shape,
    grid_pinpoints,
    letterbox,
    merge_type,
    processor_shortest_edge,
    select_best_resolution,
    square_offset,
    unpadded_box,
)
from llava.pruning import Cause, PruningTrace

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of the picture's width and height; beyond 0 … 1 there is padding."""

View = Literal["whole", "tiles"]

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class PatchGrid:
    """Visual rows that cover one box of a picture, line by line.

    Attributes:
        lines, columns: of patches.
        box: what they cover together.
        view: the picture as a whole, or cut into tiles at a higher resolution.
        newline: whether one more row, which shows nothing, ends every line.
    """

    lines: int
    columns: int
    box: Box = WHOLE
    view: View = "whole"
    newline: bool = False

    @property
    def num_rows(self) -> int:
        """Visual rows."""
        return self.lines * (self.columns + self.newline)


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


def patch_maps(checkpoint: Checkpoint, prompt: Prompt) -> list[PatchMap]:
    """The boxes of every picture's rows in a prompt of any checkpoint.

    Args:
        checkpoint: what made the prompt.
        prompt: from its `encode`.

    Returns:
        A map a picture, whose rows together are the prompt's visual rows. Where it is not known how a family lays
        its rows out, one map for all, without boxes (`PatchMap.is_known`).
    """
    sizes = [picture.image.size for picture in prompt.pictures]
    processor, config = checkpoint.image_processor, checkpoint.config
    if isinstance(checkpoint, LlavaCheckpoint):
        return [patch_map(size, processor, config, checkpoint.num_patches_per_side) for size in sizes]
    grids = patch_grids(config, processor, prompt.inputs, sizes, prompt.num_visual)
    if grids is None:
        nowhere = np.full((prompt.num_visual, 4), np.nan)
        return [PatchMap(size, nowhere, np.full(len(nowhere), "")) for size in sizes[-1:]]
    return [map_of_grids(size, own) for size, own in zip(sizes, grids, strict=True)]


def kept_rows(trace: PruningTrace) -> np.ndarray:
    """Visual rows left after selection, bool [visual rows]; all where nothing was selected or removed."""
    if trace.num_kept == trace.num_visual:
        return np.full(trace.num_visual, True)
    return np.isin(trace.visual_positions, trace.kept_positions)


@dataclass(frozen=True)
class Stay:
    """How long a prompt's patches stay in the decoder, and how. A patch is a visual row of the unpruned prompt.

    Attributes:
        alone: float64 [patches], the part of the layers in which a patch has a row to itself, 0 ... 1.
        merged: likewise, the part in which one row stands for it and others.
        chosen: bool [patches], those that have a row to themselves behind the last selection.
        groups: [patches that one row stands for behind the last selection], for each such row, int64.
        without_patch: rows behind the last selection that stand for no patch (a class token).
    """

    alone: np.ndarray
    merged: np.ndarray
    chosen: np.ndarray
    groups: list[np.ndarray]
    without_patch: int


def stay_of(trace: PruningTrace) -> Stay:
    """How long the patches of a prompt stayed, read off what was decided."""
    num_layers, visual = len(trace.rows_per_layer), trace.num_visual
    rows = [np.array([patch]) for patch in range(visual)]  # the patches that each row stands for
    counts = np.zeros((2, visual))
    last = rows
    decisions = list(trace.decisions)
    for layer in range(num_layers):
        while decisions and decisions[0].layer < layer:
            decision = decisions.pop(0)
            before = dict(zip(decision.before.tolist(), rows, strict=True))
            nothing = np.empty(0, dtype=np.int64)
            rows = [
                nothing
                if position < 0
                else np.concatenate([before[member] for member in decision.groups.get(position, [position])])
                for position in decision.positions.tolist()
            ]
            last = last if decision.cause is Cause.EXIT else rows
        for row in rows:
            counts[int(len(row) > 1), row] += 1
    chosen = np.zeros(visual, dtype=bool)
    chosen[[row[0] for row in last if len(row) == 1]] = True
    groups = [np.sort(row) for row in last if len(row) > 1]
    alone, merged = counts / num_layers
    return Stay(alone, merged, chosen, groups, sum(not len(row) for row in last))


def kept_in_words(kept: np.ndarray) -> str:
    """Kept rows of a picture that cannot be drawn on it, by number. `kept`: bool [visual rows]."""
    numbers = np.flatnonzero(kept).tolist()
    listed = ", ".join(map(str, numbers)) if numbers else "none"
    return f"where this model's visual tokens lie in the picture is not known; kept, of {len(kept)}: {listed}"


def map_of_grids(picture_size: Size, grids: Sequence[PatchGrid]) -> PatchMap:
    """The boxes of one picture's rows from its family's grids."""
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


# --- the layouts of transformers' families ---


def cropped_box(processor: Any, size: Size) -> Box:
    """What a CLIP processor (resize, then centre crop) leaves of a picture of this size."""
    width, height = size
    if getattr(processor, "do_resize", True):
        shortest = _entry(processor.size, "shortest_edge")
        if shortest is None:
            width, height = _entry(processor.size, "width"), _entry(processor.size, "height")
        elif width <= height:
            width, height = shortest, int(shortest * height / width)
        else:
            width, height = int(shortest * width / height), shortest
    if not getattr(processor, "do_center_crop", True):
        return WHOLE
    across, down = _entry(processor.crop_size, "width"), _entry(processor.crop_size, "height")
    left, top = (width - across) // 2, (height - down) // 2
    return left / width, top / height, (left + across) / width, (top + down) / height


@dataclass(frozen=True)
class ProcessedPictures:
    """One prompt's pictures as a family's processor left them.

    Attributes:
        config: the model's.
        processor: the image processor.
        inputs: what the whole processor gave beside ids and mask.
        sizes: of the original pictures.
    """

    config: Any
    processor: Any
    inputs: Mapping[str, Any]
    sizes: Sequence[Size]


Layout = Callable[[ProcessedPictures], list[list[PatchGrid]]]
"""The grids of every picture, in the order of the rows."""


def merged_grid(pictures: ProcessedPictures) -> list[list[PatchGrid]]:
    """Qwen-VL: the picture squeezed to whole patches, `image_grid_thw` of them, merged two by two."""
    merge = pictures.config.vision_config.spatial_merge_size
    grids = pictures.inputs["image_grid_thw"].tolist()
    return [[PatchGrid(height // merge, width // merge)] for _, height, width in grids]


def cropped_square(pictures: ProcessedPictures) -> list[list[PatchGrid]]:
    """LLaVA-1.5 as transformers prepares it: the shorter side resized, the middle cropped."""
    patch = pictures.config.vision_config.patch_size
    lines, columns = (side // patch for side in pictures.inputs["pixel_values"].shape[-2:])
    return [[PatchGrid(lines, columns, cropped_box(pictures.processor, size))] for size in pictures.sizes]


def anyres(pictures: ProcessedPictures) -> list[list[PatchGrid]]:
    """LLaVA-NeXT: the picture squeezed into one tile, then fitted into the best grid of tiles, padding cut away."""
    return [_anyres(pictures, size) for size in pictures.sizes]


def anyres_max(pictures: ProcessedPictures) -> list[list[PatchGrid]]:
    """LLaVA-OneVision: as NeXT, with the tiles' map scaled down where it is large.

    Pictures that its processor is given as several of one prompt are padded to a square and not cut into tiles.
    """
    most_tiles = int(pictures.config.vision_aspect_ratio.removeprefix("anyres_max_"))
    side = _patches_a_side(pictures.config)
    is_alone = [count == 1 for count in pictures.inputs["batch_num_images"].tolist() for _ in range(count)]
    grids = []
    for (width, height), alone in zip(pictures.sizes, is_alone, strict=True):
        if alone:
            grids.append(_anyres(pictures, (width, height), most_tiles))
            continue
        square = max(width, height)
        left, top = (square - width) // 2, (square - height) // 2
        box = -left / width, -top / height, (square - left) / width, (square - top) / height
        # The one newline row stands behind the whole picture.
        grids.append([PatchGrid(side, side, box), PatchGrid(1, 0, newline=True)])
    return grids


def tiles_then_thumbnail(pictures: ProcessedPictures) -> list[list[PatchGrid]]:
    """InternVL: the picture squeezed into the grid of tiles nearest to its shape, then as a whole."""
    # Here, because the module of other families' users need not be there.
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    processor, vision = pictures.processor, pictures.config.vision_config
    tile = vision.image_size
    lines, columns = (
        int(side / patch * pictures.config.downsample_ratio)
        for side, patch in zip(_pair(tile), _pair(vision.patch_size), strict=True)
    )
    whole = PatchGrid(lines, columns)
    if len(pictures.inputs["pixel_values"]) == len(pictures.sizes):  # not cut, or too small to be
        return [[whole] for _ in pictures.sizes]
    side = _entry(processor.size, "height"), _entry(processor.size, "width")
    grids = []
    for width, height in pictures.sizes:
        across, down = get_optimal_tiled_canvas((height, width), side, processor.min_patches, processor.max_patches)
        grids.append([*_tiles(down, across, lines, columns), whole] if across * down > 1 else [whole])
    return grids


def split_then_whole(pictures: ProcessedPictures) -> list[list[PatchGrid]]:
    """Idefics3, SmolVLM: the picture squeezed into whole tiles, as many as its size asks for, then as a whole."""
    vision = pictures.config.vision_config
    side = int(vision.image_size // vision.patch_size // pictures.config.scale_factor)
    whole = PatchGrid(side, side)
    grids = []
    for width, height in pictures.sizes:
        _, down, across = pictures.processor.get_number_of_image_patches(height, width)
        grids.append([*_tiles(down, across, side, side), whole])
    return grids


# By the `model_type` of the whole model's config.
LAYOUTS: dict[str, Layout] = {
    "llava": cropped_square,
    "llava_next": anyres,
    "llava_onevision": anyres_max,
    "internvl": tiles_then_thumbnail,
    "smolvlm": split_then_whole,
    "idefics3": split_then_whole,
    "qwen2_vl": merged_grid,
    "qwen2_5_vl": merged_grid,
    "qwen3_vl": merged_grid,
}


def patch_grids(
    config: Any, processor: Any, inputs: Mapping[str, Any], sizes: Sequence[Size], num_visual: int
) -> list[list[PatchGrid]] | None:
    """Where the visual rows of one prompt look in its pictures, by its family's layout.

    Args:
        config: the whole model's.
        processor: the image processor that prepared the pictures.
        inputs: what the model's processor gave beside ids and mask.
        sizes: (width, height) of each picture.
        num_visual: visual rows of the prompt.

    Returns:
        Grids of every picture in the order of the rows; None where that is not known: a family without a layout, a
        video, or settings that the layout does not reckon with and that give other numbers of rows.
    """
    layout = LAYOUTS.get(config.model_type)
    if layout is None or not sizes or "pixel_values" not in inputs:
        return None
    grids = layout(ProcessedPictures(config, processor, inputs, sizes))
    known = len(grids) == len(sizes) and num_visual == sum(grid.num_rows for own in grids for grid in own)
    return grids if known else None


def _tiles(down: int, across: int, lines: int, columns: int) -> list[PatchGrid]:
    return [
        PatchGrid(lines, columns, (x / across, y / down, (x + 1) / across, (y + 1) / down), "tiles")
        for y in range(down)
        for x in range(across)
    ]


def _anyres(pictures: ProcessedPictures, size: Size, most_tiles: int | None = None) -> list[PatchGrid]:
    (width, height), side = size, _patches_a_side(pictures.config)
    tile = pictures.config.vision_config.image_size
    # Heights come first in transformers.
    canvas = select_best_resolution(size, [(w, h) for h, w in pictures.config.image_grid_pinpoints])
    lines, columns = canvas[1] // tile * side, canvas[0] // tile * side

    # Fitted into the canvas and centred; the box of the whole canvas in the picture.
    left, top, fitted_width, fitted_height = letterbox(size, canvas)
    box_left, box_top = -left / fitted_width, -top / fitted_height
    box_width, box_height = canvas[0] / fitted_width, canvas[1] / fitted_height

    # Lines or columns of padding are cut from the map, in whole patches.
    if width / height > columns / lines:
        cut = (lines - int(round(height * (columns / width), 7))) // 2
        box_top, box_height = box_top + box_height * cut / lines, box_height * (lines - 2 * cut) / lines
        lines -= 2 * cut
    else:
        cut = (columns - int(round(width * (lines / height), 7))) // 2
        box_left, box_width = box_left + box_width * cut / columns, box_width * (columns - 2 * cut) / columns
        columns -= 2 * cut
    if most_tiles is not None:
        ratio = sqrt(lines * columns / (most_tiles * side**2))
        if ratio > 1.1:
            lines, columns = int(lines // ratio), int(columns // ratio)
    box = box_left, box_top, box_left + box_width, box_top + box_height
    return [PatchGrid(side, side), PatchGrid(lines, columns, box, "tiles", newline=True)]


def _patches_a_side(config: Any) -> int:
    return config.vision_config.image_size // config.vision_config.patch_size


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def _entry(size: Any, name: str) -> Any:
    """An entry of a processor's size, which is a mapping or an object; None where it has none."""
    return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
