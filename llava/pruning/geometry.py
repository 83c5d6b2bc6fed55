"""Where in its picture a visual row looks, by model family.

Every family cuts a picture into one grid of patches or several, each over an upright box of it: the picture squeezed
or cropped to the tower's input, or a tile of it. A family's function reads the grids off what its processor gave and
the settings it used, so that pictures of kept rows need no run of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

from transformers.image_processing_utils import select_best_resolution

Size = tuple[int, int]
"""Width and height in pixels, the order of `PIL.Image.size`."""

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
class Prepared:
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


Layout = Callable[[Prepared], list[list[PatchGrid]]]
"""The grids of every picture, in the order of the rows."""


def merged_grid(prepared: Prepared) -> list[list[PatchGrid]]:
    """Qwen-VL: the picture squeezed to whole patches, `image_grid_thw` of them, merged two by two."""
    merge = prepared.config.vision_config.spatial_merge_size
    grids = prepared.inputs["image_grid_thw"].tolist()
    return [[PatchGrid(height // merge, width // merge)] for _, height, width in grids]


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


def cropped_square(prepared: Prepared) -> list[list[PatchGrid]]:
    """LLaVA-1.5 as transformers prepares it: the shorter side resized, the middle cropped."""
    patch = prepared.config.vision_config.patch_size
    lines, columns = (side // patch for side in prepared.inputs["pixel_values"].shape[-2:])
    return [[PatchGrid(lines, columns, cropped_box(prepared.processor, size))] for size in prepared.sizes]


def anyres(prepared: Prepared) -> list[list[PatchGrid]]:
    """LLaVA-NeXT: the picture squeezed into one tile, then fitted into the best grid of tiles, padding cut away."""
    return [_anyres(prepared, size) for size in prepared.sizes]


def anyres_max(prepared: Prepared) -> list[list[PatchGrid]]:
    """LLaVA-OneVision: as NeXT, with the tiles' map scaled down where it is large.

    Pictures that its processor is given as several of one prompt are padded to a square and not cut into tiles.
    """
    most_tiles = int(prepared.config.vision_aspect_ratio.removeprefix("anyres_max_"))
    side = _patches_a_side(prepared.config)
    is_alone = [count == 1 for count in prepared.inputs["batch_num_images"].tolist() for _ in range(count)]
    grids = []
    for (width, height), alone in zip(prepared.sizes, is_alone, strict=True):
        if alone:
            grids.append(_anyres(prepared, (width, height), most_tiles))
            continue
        square = max(width, height)
        left, top = (square - width) // 2, (square - height) // 2
        box = -left / width, -top / height, (square - left) / width, (square - top) / height
        # The one newline row stands behind the whole picture.
        grids.append([PatchGrid(side, side, box), PatchGrid(1, 0, newline=True)])
    return grids


def tiles_then_thumbnail(prepared: Prepared) -> list[list[PatchGrid]]:
    """InternVL: the picture squeezed into the grid of tiles nearest to its shape, then as a whole."""
    # Here, because the module of other families' users need not be there.
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    processor, vision = prepared.processor, prepared.config.vision_config
    tile = vision.image_size
    lines, columns = (
        int(side / patch * prepared.config.downsample_ratio)
        for side, patch in zip(_pair(tile), _pair(vision.patch_size), strict=True)
    )
    whole = PatchGrid(lines, columns)
    if len(prepared.inputs["pixel_values"]) == len(prepared.sizes):  # not cut, or too small to be
        return [[whole] for _ in prepared.sizes]
    side = _entry(processor.size, "height"), _entry(processor.size, "width")
    grids = []
    for width, height in prepared.sizes:
        across, down = get_optimal_tiled_canvas((height, width), side, processor.min_patches, processor.max_patches)
        grids.append([*_tiles(down, across, lines, columns), whole] if across * down > 1 else [whole])
    return grids


def split_then_whole(prepared: Prepared) -> list[list[PatchGrid]]:
    """Idefics3, SmolVLM: the picture squeezed into whole tiles, as many as its size asks for, then as a whole."""
    vision = prepared.config.vision_config
    side = int(vision.image_size // vision.patch_size // prepared.config.scale_factor)
    whole = PatchGrid(side, side)
    grids = []
    for width, height in prepared.sizes:
        _, down, across = prepared.processor.get_number_of_image_patches(height, width)
        grids.append([*_tiles(down, across, side, side), whole])
    return grids


def _tiles(down: int, across: int, lines: int, columns: int) -> list[PatchGrid]:
    return [
        PatchGrid(lines, columns, (x / across, y / down, (x + 1) / across, (y + 1) / down), "tiles")
        for y in range(down)
        for x in range(across)
    ]


def _anyres(prepared: Prepared, size: Size, most_tiles: int | None = None) -> list[PatchGrid]:
    (width, height), side = size, _patches_a_side(prepared.config)
    tile = prepared.config.vision_config.image_size
    # Heights come first in transformers.
    canvas_height, canvas_width = select_best_resolution((height, width), prepared.config.image_grid_pinpoints)
    lines, columns = canvas_height // tile * side, canvas_width // tile * side

    # Fitted into the canvas and centred; the box of the whole canvas in the picture.
    scale_x, scale_y = canvas_width / width, canvas_height / height
    fitted_width, fitted_height = canvas_width, canvas_height
    if scale_x < scale_y:
        fitted_height = min(-(-height * canvas_width // width), canvas_height)
    else:
        fitted_width = min(-(-width * canvas_height // height), canvas_width)
    left, top = (canvas_width - fitted_width) // 2, (canvas_height - fitted_height) // 2
    box_left, box_top = -left / fitted_width, -top / fitted_height
    box_width, box_height = canvas_width / fitted_width, canvas_height / fitted_height

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
