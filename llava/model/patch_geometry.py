"""Where in the original picture each visual row looks: pure arithmetic, the inverse of ``process_images`` + splice.

The way of a pixel: picture → canvas (padded to a square, fitted into a grid, or as it is) → resized and cropped by
the processor → tile of the tower → patch → row. Here it is followed backwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava.mm_utils import (
    Size,
    get_anyres_image_grid_shape,
    letterbox,
    merge_type,
    processor_crop,
    processor_shortest_edge,
    square_offset,
    unpadded_box,
)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the original picture; ``left <= x < right``, ``top <= y < bottom``."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        """Square pixels."""
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True)
class _Axes:
    """Tile pixels → picture pixels: ``picture = (tile + offset) * scale - shift``, along x and along y."""

    offset: tuple[float, float]
    scale: tuple[float, float]
    shift: tuple[float, float]

    def box(self, left: float, top: float, right: float, bottom: float, size: Size) -> Box | None:
        """The picture's part under a rectangle of tile pixels, or ``None`` where there is only padding."""
        xs, ys = (
            [
                min(max((value + self.offset[axis]) * self.scale[axis] - self.shift[axis], 0.0), size[axis])
                for value in pair
            ]
            for axis, pair in enumerate(((left, right), (top, bottom)))
        )
        return Box(xs[0], ys[0], xs[1], ys[1]) if xs[0] < xs[1] and ys[0] < ys[1] else None


def row_boxes(image_size: Size, config: Any, image_processor: Any, tower: Any) -> list[Box | None]:
    """The part of the picture that each row of one image shows, in the rows' order.

    Args:
        image_size: (width, height) of the original picture.
        config: the model's config (``image_aspect_ratio`` and what belongs to it).
        image_processor: the one that prepared the picture.
        tower: the vision tower, for its tile size, patches a side and whether it keeps the class token.

    Returns:
        One entry a row of the splice: a box, or ``None`` for rows that show no part of the picture (padding, class
        token, newline).
    """
    side, tile = tower.num_patches_per_side, tower.image_size
    leading: list[Box | None] = [] if tower.select_feature == "patch" else [None]

    def tile_rows(axes: _Axes) -> list[Box | None]:
        return leading + _grid(axes, image_size, (0, 0, side, side), tile / side)

    aspect = getattr(config, "image_aspect_ratio", None)
    if aspect == "pad":
        canvas = (max(image_size),) * 2
        return tile_rows(_through_processor(canvas, image_processor, shift=square_offset(image_size)))
    if aspect != "anyres":
        return tile_rows(_through_processor(image_size, image_processor))

    width, height = image_size
    edge = processor_shortest_edge(image_processor)
    squeezed = _through_processor((edge, edge), image_processor, scale=(width / edge, height / edge))
    rows = tile_rows(squeezed)
    columns_of_tiles, rows_of_tiles = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, tile)
    left, top, fitted_width, fitted_height = letterbox(image_size, (columns_of_tiles * tile, rows_of_tiles * tile))
    fit = (width / fitted_width, height / fitted_height)

    def on_grid(tile_column: int, tile_row: int) -> _Axes:
        offset = (tile_column * tile - left, tile_row * tile - top)
        return _Axes(offset, fit, (0, 0))

    merge = merge_type(config)
    if merge == "flat":
        for tile_row in range(rows_of_tiles):
            for tile_column in range(columns_of_tiles):
                rows += tile_rows(on_grid(tile_column, tile_row))
        return rows
    cells = (columns_of_tiles * side, rows_of_tiles * side)
    window = (0, 0, *cells) if merge == "spatial" else unpadded_box(image_size, cells)
    for cell_row in range(window[1], window[3]):
        line = (window[0], cell_row, window[2], cell_row + 1)
        rows += _grid(on_grid(0, 0), image_size, line, tile / side)
        if merge == "spatial_unpad":
            rows.append(None)
    return rows


def _grid(axes: _Axes, size: Size, window: tuple[int, int, int, int], patch: float) -> list[Box | None]:
    """Boxes of the patches in ``window`` (left, top, right, bottom in patches), row by row."""
    left, top, right, bottom = window
    return [
        axes.box(x * patch, y * patch, (x + 1) * patch, (y + 1) * patch, size)
        for y in range(top, bottom)
        for x in range(left, right)
    ]


def _through_processor(
    canvas: Size,
    processor: Any,
    scale: tuple[float, float] = (1.0, 1.0),
    shift: tuple[float, float] = (0.0, 0.0),
) -> _Axes:
    """Axes of a tile that the processor makes of a canvas; ``scale`` and ``shift`` lead from canvas to picture."""
    (resized_width, resized_height), (crop_left, crop_top) = processor_crop(canvas, processor)
    return _Axes(
        offset=(crop_left, crop_top),
        scale=(canvas[0] / resized_width * scale[0], canvas[1] / resized_height * scale[1]),
        shift=shift,
    )
