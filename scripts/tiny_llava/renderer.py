"""Draws the pictures that the shipped model is trained and measured on.

A `Scene` says everything about a picture (96×96, one to five coloured shapes, at most one short text), so the
question writer never looks at pixels. Shapes, colours and tinted backgrounds are those of easy-VQA, with two
more shapes.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 96
PATCH = 8
GRID = SIDE // PATCH
OVERSAMPLING = 3

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
    "brown": (165, 42, 42),
}
SHAPES = ("circle", "rectangle", "triangle", "star", "cross")
SIZES = {"small": (13, 16), "large": (23, 30)}  # side of the bounding box in pixels
TEXT_COLORS = ("black", "blue", "red", "brown", "teal")
# No vowels (a text is never a word of a question) and no pair that looks alike at this size (O/0, 2/Z, 5/S, 8/B).
GLYPHS = "cdfhjklmnprstvxz34679"
MAX_ITEMS = 5
MARGIN = 3  # pixels that stay free between two things


@dataclass(frozen=True)
class Item:
    """One coloured shape; centre and extent in pixels."""

    shape: str
    color: str
    size: str
    rgb: tuple[int, int, int]
    cx: float
    cy: float
    width: float
    height: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels."""
        return (
            self.cx - self.width / 2,
            self.cy - self.height / 2,
            self.cx + self.width / 2,
            self.cy + self.height / 2,
        )


@dataclass(frozen=True)
class Text:
    """One to three characters, drawn in capitals; `text` is the lower-case answer."""

    text: str
    color: str
    rgb: tuple[int, int, int]
    left: float
    top: float
    font_size: int

    @property
    def glyph_boxes(self) -> tuple[tuple[float, float, float, float], ...]:
        """Box of each character, in reading order, in pixels."""
        boxes, left = [], self.left
        height = _glyph_height(self.font_size)
        for glyph in self.text:
            width = _glyph_width(glyph, self.font_size)
            boxes.append((left, self.top, left + width, self.top + height))
            left += width + 1
        return tuple(boxes)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the whole text in pixels."""
        boxes = self.glyph_boxes
        return boxes[0][0], boxes[0][1], boxes[-1][2], boxes[-1][3]


@dataclass(frozen=True)
class Scene:
    """Everything there is in one picture."""

    background: tuple[int, int, int]
    items: tuple[Item, ...]
    text: Text | None


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow has no FreeType support, which drawing text needs: install a Pillow wheel")
    return font


@functools.cache
def _glyph_width(glyph: str, size: int) -> float:
    left, _, right, _ = _font(size * OVERSAMPLING).getbbox(glyph.upper(), stroke_width=OVERSAMPLING // 2)
    return (right - left) / OVERSAMPLING


@functools.cache
def _glyph_height(size: int) -> float:
    _, top, _, bottom = _font(size * OVERSAMPLING).getbbox("H", stroke_width=OVERSAMPLING // 2)
    return (bottom - top) / OVERSAMPLING


def _shade(name: str, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel + rng.randint(-8, 8))) for channel in COLORS[name])
    return red, green, blue


def _free(box: tuple[float, float, float, float], taken: list[tuple[float, float, float, float]]) -> bool:
    return all(
        box[2] + MARGIN <= other[0]
        or other[2] + MARGIN <= box[0]
        or box[3] + MARGIN <= other[1]
        or other[3] + MARGIN <= box[1]
        for other in taken
    )


def _place_text(rng: random.Random) -> Text:
    text = "".join(rng.choice(GLYPHS) for _ in range(rng.choice((1, 2, 2, 3, 3))))
    color = rng.choice(TEXT_COLORS)
    draft = Text(text, color, _shade(color, rng), 0.0, 0.0, rng.randint(19, 23))
    _, _, width, height = draft.box
    left, top = rng.uniform(2, SIDE - 2 - width), rng.uniform(2, SIDE - 2 - height)
    return Text(text, color, draft.rgb, left, top, draft.font_size)


def make_scene(
    rng: random.Random, *, items: int | None = None, text: bool | None = None, repeats: bool | None = None
) -> Scene:
    """Draw the lots of one picture.

    Parameters
    ----------
    rng
        The only source of chance: equal generators give equal scenes.
    items
        How many shapes to try for, 1 to 5; by chance if None. A shape that finds no free place is left out,
        the first one never.
    text
        Whether there is a text; by chance (3 of 5) if None.
    repeats
        Whether shapes and colours come from a small selection, so that they repeat; by chance if None.
    """
    background = (rng.randint(225, 255), rng.randint(225, 255), rng.randint(225, 255))
    wanted = rng.choice((1, 2, 2, 3, 3, 4, 4, 5)) if items is None else items
    if not 1 <= wanted <= MAX_ITEMS:
        raise ValueError(f"items must be between 1 and {MAX_ITEMS}, not {wanted}")
    shapes, colors = list(SHAPES), list(COLORS)
    if rng.random() < 0.5 if repeats is None else repeats:
        shapes, colors = rng.sample(shapes, rng.randint(1, 2)), rng.sample(colors, rng.randint(1, 3))
    written = _place_text(rng) if (rng.random() < 0.6 if text is None else text) else None
    taken = [written.box] if written else []
    placed: list[Item] = []
    for _ in range(wanted):
        shape, color = rng.choice(shapes), rng.choice(colors)
        size = "small" if rng.random() < (0.5 if wanted < 4 else 0.7) else "large"
        rgb = _shade(color, rng)
        for attempt in range(24):
            if attempt == 16:
                size = "small"
            low, high = SIZES[size]
            width = rng.uniform(low, high)
            height = rng.uniform(low, high) if shape == "rectangle" else width
            cx = rng.uniform(width / 2 + 1, SIDE - 1 - width / 2)
            cy = rng.uniform(height / 2 + 1, SIDE - 1 - height / 2)
            item = Item(shape, color, size, rgb, cx, cy, width, height)
            if _free(item.box, taken):
                placed.append(item)
                taken.append(item.box)
                break
    if not placed:  # a text left no room in the middle: without it there always is
        return make_scene(rng, items=items, text=False, repeats=repeats)
    return Scene(background, tuple(placed), written)


def _draw_item(draw: ImageDraw.ImageDraw, item: Item, scale: float, fill: int | tuple[int, int, int]) -> None:
    left, top, right, bottom = (value * scale for value in item.box)
    if item.shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif item.shape == "rectangle":
        draw.rectangle((left, top, right, bottom), fill=fill)
    elif item.shape == "triangle":
        draw.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=fill)
    elif item.shape == "cross":
        third = (right - left) / 3
        draw.rectangle((left + third, top, right - third, bottom), fill=fill)
        draw.rectangle((left, top + third, right, bottom - third), fill=fill)
    else:
        cx, cy, radius = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
        corners = []
        for k in range(10):
            reach = radius if k % 2 == 0 else radius * 0.42
            angle = math.pi * (k / 5 - 0.5)
            corners.append((cx + reach * math.cos(angle), cy + reach * math.sin(angle)))
        draw.polygon(corners, fill=fill)


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of 96×96 pixels, edges smoothed."""
    big = SIDE * OVERSAMPLING
    picture = Image.new("RGB", (big, big), scene.background)
    draw = ImageDraw.Draw(picture)
    for item in scene.items:
        _draw_item(draw, item, OVERSAMPLING, item.rgb)
    if scene.text:
        font = _font(scene.text.font_size * OVERSAMPLING)
        stroke = OVERSAMPLING // 2
        for glyph, (left, top, _, _) in zip(scene.text.text, scene.text.glyph_boxes, strict=True):
            ink_left, _, _, _ = font.getbbox(glyph.upper(), stroke_width=stroke)
            _, cap_top, _, _ = font.getbbox("H", stroke_width=stroke)
            origin = (left * OVERSAMPLING - ink_left, top * OVERSAMPLING - cap_top)
            draw.text(origin, glyph.upper(), fill=scene.text.rgb, font=font, stroke_width=stroke)
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


LABELS = {  # what the tower learns to say about every patch, and how many classes each has
    "shape": len(SHAPES) + 2,  # 0 nothing, then the shapes, last: text
    "color": len(COLORS) + 1,
    "glyph": len(GLYPHS) + 1,
    "place": 4,  # 0 no text, else which character of it
    "column": GRID,  # of the centre of the thing that the patch belongs to
    "row": GRID,
    "centre": 2,  # whether that centre lies in this very patch: what counting counts
}
TEXT = len(SHAPES) + 1  # the label of text among the shapes
COLUMN, ROW, CENTRE = (list(LABELS).index(name) for name in ("column", "row", "centre"))


def labels_from_masks(masks: list[tuple[np.ndarray, dict[str, int]]]) -> np.ndarray:
    """Patch labels, int64 [144, 7] in the order of `LABELS`, from bool [96, 96] masks and what each of them is.

    A patch belongs to the thing that covers most of it, if that is at least an eighth of its pixels.
    """
    labels = np.zeros((GRID * GRID, len(LABELS)), dtype=np.int64)
    best = np.full(GRID * GRID, PATCH * PATCH // 8 - 1)
    for mask, names in masks:
        covered = mask.reshape(GRID, PATCH, GRID, PATCH).sum(axis=(1, 3)).reshape(-1)
        wins = covered > best
        labels[wins] = [names.get(key, 0) for key in LABELS]
        best = np.where(wins, covered, best)
    row, column = np.divmod(np.arange(GRID * GRID), GRID)
    labels[:, CENTRE] = (labels[:, 0] > 0) & (labels[:, COLUMN] == column) & (labels[:, ROW] == row)
    return labels


def _cell(value: float) -> int:
    return min(GRID - 1, max(0, int(value // PATCH)))


def patches_of(labels: np.ndarray, item: Item) -> np.ndarray:
    """Which patches, bool [144], belong to an item of the scene that `patch_labels` labelled."""
    names = (list(SHAPES).index(item.shape) + 1, list(COLORS).index(item.color) + 1, _cell(item.cx), _cell(item.cy))
    return (labels[:, [0, 1, COLUMN, ROW]] == names).all(axis=1)


def patch_labels(scene: Scene) -> np.ndarray:
    """What stands where: int64 [144, 7], one row a patch in reading order, columns as in `LABELS`."""
    shapes, colors = list(SHAPES), list(COLORS)
    masks = []
    for item in scene.items:
        canvas = Image.new("L", (SIDE, SIDE))
        _draw_item(ImageDraw.Draw(canvas), item, 1, 255)
        names = {
            "shape": shapes.index(item.shape) + 1,
            "color": colors.index(item.color) + 1,
            "column": _cell(item.cx),
            "row": _cell(item.cy),
        }
        masks.append((np.asarray(canvas) > 0, names))
    if scene.text:
        for place, box in enumerate(scene.text.glyph_boxes):
            mask = np.zeros((SIDE, SIDE), dtype=bool)
            left, top, right, bottom = (round(value) for value in box)
            mask[top:bottom, left:right] = True
            names = {
                "shape": TEXT,
                "color": colors.index(scene.text.color) + 1,
                "glyph": GLYPHS.index(scene.text.text[place]) + 1,
                "place": place + 1,
                "column": _cell((box[0] + box[2]) / 2),
                "row": _cell((box[1] + box[3]) / 2),
            }
            masks.append((mask, names))
    return labels_from_masks(masks)
