"""Kept patches drawn on the picture itself, with Pillow alone: pages and programs need no plotting library for it.

Colours are told apart by people with any colour vision (Okabe and Ito's set).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageOps

from .patches import PatchMap, Stay

BLUE, ORANGE, GREEN, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#999999"
GROUPS = (BLUE, "#CC79A7", GREEN, "#8C6D1F", SKY, "#5E3C99", "#444444")
"""Of merged patches, told apart from `ORANGE`."""


def overlay_kept(picture: Image.Image, patches: PatchMap, kept: np.ndarray) -> Image.Image:
    """The picture, dimmed where no patch was kept, kept patches outlined; RGB, at most 768 pixels a side.

    Patches of an anyres picture's two views are outlined in two colours.
    """
    bright, boxes = _canvas(picture, patches)
    result = Image.blend(bright, Image.new("RGB", bright.size, "white"), 0.65)
    frames = []
    for row in np.flatnonzero(np.asarray(kept, dtype=bool)).tolist():
        if row in boxes:
            result.paste(bright.crop(boxes[row]), boxes[row][:2])
            frames.append((boxes[row], ORANGE if patches.views[row] == "whole" else BLUE))
    _frame(result, frames)
    return result


def _canvas(picture: Image.Image, patches: PatchMap) -> tuple[Image.Image, dict[int, tuple[int, int, int, int]]]:
    """The picture in a size to draw on, RGB, and each row's box on it; rows that show nothing of it are left out."""
    scale = min(1.0, 768 / max(picture.size))
    # Small pictures are enlarged, so that outlines do not hide them.
    scale = max(scale, 336 / max(picture.size))
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    boxes = {}
    for row in np.flatnonzero(patches.on_picture).tolist():
        left, top, right, bottom = patches.boxes[row] * scale
        box = max(0, round(left)), max(0, round(top)), min(size[0], round(right)), min(size[1], round(bottom))
        if box[2] > box[0] and box[3] > box[1]:
            boxes[row] = box
    return picture.convert("RGB").resize(size), boxes


def _frame(image: Image.Image, frames: Sequence[tuple[tuple[int, int, int, int], str]]) -> None:
    canvas = ImageDraw.Draw(image)
    for (left, top, right, bottom), colour in frames:
        canvas.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=2)


def overlay_stay(picture: Image.Image, patches: PatchMap, stay: Stay) -> Image.Image:
    """The picture, patches framed that stay as rows of their own, in colours those that rows of several stand for, and
    the others the paler, the sooner they left. RGB, from 336 to 768 pixels a side."""
    bright, boxes = _canvas(picture, patches)
    result = Image.blend(Image.new("RGB", bright.size, "white"), bright, 0.12)
    for row, box in boxes.items():
        cell = bright.crop(box)
        gone = Image.new("RGB", cell.size, "white")
        result.paste(Image.blend(gone, cell, 0.12 + 0.88 * stay.alone[row]), box[:2])
    for number, group in enumerate(stay.groups):
        colour = GROUPS[number % len(GROUPS)]
        mask = Image.new("L", bright.size)
        for row in filter(boxes.__contains__, group.tolist()):
            mask.paste(255, boxes[row])
        tint = Image.blend(Image.new("RGB", bright.size, mixed(colour, 0.3)), bright, 0.35)
        result.paste(tint, mask=mask)
        inner = ImageOps.crop(ImageOps.expand(mask, 2).filter(ImageFilter.MinFilter(5)), 2)
        result.paste(colour, mask=ImageChops.subtract(mask, inner))
    _frame(result, [(boxes[row], ORANGE) for row in np.flatnonzero(stay.chosen).tolist() if row in boxes])
    return result


def mixed(colour: str, share: float) -> str:
    """`share` of a colour, the rest white."""
    red, green, blue = (round(255 * (1 - share) + share * part) for part in ImageColor.getrgb(colour)[:3])
    return f"#{red:02x}{green:02x}{blue:02x}"
