"""The real easy-VQA data set (PyPI package `easy-vqa`, MIT): pictures, questions, and labels for their patches."""

from __future__ import annotations

import functools

import easy_vqa
import numpy as np
from PIL import Image

from .renderer import COLORS, GRID, PATCH, SHAPES, SIDE, labels_from_masks


@functools.cache
def easy_questions(split: str) -> list[tuple[str, str, int]]:
    """All (question, answer, image number) of `train` or `test`, as the package has them."""
    if split not in ("train", "test"):
        raise ValueError(f"easy-VQA has the splits train and test, not {split!r}")
    get = easy_vqa.get_train_questions if split == "train" else easy_vqa.get_test_questions
    return list(zip(*get(), strict=True))


@functools.cache
def easy_paths(split: str) -> dict[int, str]:
    """The file of every image number of a split."""
    get = easy_vqa.get_train_image_paths if split == "train" else easy_vqa.get_test_image_paths
    return get()


@functools.cache
def easy_by_image(split: str) -> list[tuple[int, list[tuple[str, str]]]]:
    """(image number, its questions and answers) for every picture of a split."""
    grouped: dict[int, list[tuple[str, str]]] = {}
    for text, answer, image in easy_questions(split):
        grouped.setdefault(image, []).append((text, answer))
    return sorted(grouped.items())


@functools.cache
def easy_picture(split: str, image: int) -> Image.Image:
    """One picture, RGB, 64×64 as it is in the package."""
    with Image.open(easy_paths(split)[image]) as picture:
        return picture.convert("RGB")


def easy_labels(picture: Image.Image) -> np.ndarray:
    """Patch labels as `renderer.patch_labels` gives them, found in the pixels.

    An easy-VQA picture is one evenly coloured shape on one light tint. The colour is the nearest of the data
    set's eight. A triangle has most of its area in the lower half of its bounding box, a rectangle fills the box.
    """
    pixels = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)).astype(int)
    tint = np.median(pixels.reshape(-1, 3), axis=0) if _mostly_tint(pixels) else pixels[0, 0]
    mask = np.abs(pixels - tint).max(axis=2) > 60
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    box = mask[top:bottom, left:right]
    half = len(box) // 2
    heavy_below = box[-half:].sum() > 1.5 * box[:half].sum()
    shape = "triangle" if heavy_below else "rectangle" if box.mean() > 0.92 else "circle"
    mean = np.median(pixels[mask], axis=0)
    color = min(range(len(COLORS)), key=lambda k: np.abs(np.array(list(COLORS.values())[k]) - mean).sum())
    names = {
        "shape": SHAPES.index(shape) + 1,
        "color": color + 1,
        "column": min(GRID - 1, (left + right) // 2 // PATCH),
        "row": min(GRID - 1, (top + bottom) // 2 // PATCH),
    }
    return labels_from_masks([(mask, names)])


def _mostly_tint(pixels: np.ndarray) -> bool:
    colors, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return counts.max() > pixels.shape[0] * pixels.shape[1] / 2 and colors[counts.argmax()].min() > 200
