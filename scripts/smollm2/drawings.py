"""Sets of drawings: which, from where, under what license; and every noun of a set as a small RGBA picture.

A set is one file of the npm registry, a JSON of SVG paths by name that the Iconify project keeps:
``bash scripts/smollm2/drawings.sh FOLDER`` fetches all of them (11 MB).
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.utils import UserError

from .nouns import NOUNS

SIDE = 112
"""Pixels a side that a drawing is kept in; scenes scale it."""


@dataclass(frozen=True)
class DrawingSet:
    """One hand's drawings: the file's name at the registry, who drew them, and the license they are under."""

    name: str
    author: str
    license: str
    held_out: bool = False


SETS = (
    DrawingSet("openmoji", "OpenMoji, HfG Schwäbisch Gmünd", "CC BY-SA 4.0"),
    DrawingSet("noto", "Noto Emoji, Google", "Apache-2.0"),
    DrawingSet("noto-v1", "Noto Emoji of 2013–2017, Google", "Apache-2.0"),
    DrawingSet("twemoji", "Twemoji, Twitter and contributors", "CC BY 4.0"),
    DrawingSet("emojione", "EmojiOne 2 (Emojitwo)", "CC BY 4.0"),
    DrawingSet("fluent-emoji-flat", "Fluent Emoji, Microsoft", "MIT", held_out=True),
)
SEEN = tuple(entry.name for entry in SETS if not entry.held_out)
UNSEEN = tuple(entry.name for entry in SETS if entry.held_out)


class Drawings:
    """All nouns of the named sets.

    Args:
        folder: where ``drawings.sh`` put the sets; rendered once, into ``rendered.npz`` beside them.
        sets: names of the sets to draw from.

    Raises:
        UserError: a set is not in the folder, or resvg is not installed.
    """

    def __init__(self, folder: Path, sets: tuple[str, ...] = SEEN) -> None:
        cache = folder / "rendered.npz"
        if not cache.is_file():
            np.savez_compressed(cache, **{entry.name: _render_set(folder, entry.name) for entry in SETS})
        with np.load(cache) as rendered:
            pixels = {name: rendered[name] for name in sets}
        self._of: dict[str, list[Image.Image]] = {name: [] for name in NOUNS}
        for sheet in pixels.values():
            for name, drawing in zip(NOUNS, sheet, strict=True):
                if drawing[..., 3].any():  # a set may lack a noun
                    self._of[name].append(Image.fromarray(drawing))

    def of(self, noun: str) -> list[Image.Image]:
        """The noun's drawings, RGBA, one from each set that has it, cut to what is drawn."""
        return self._of[noun]


def _render_set(folder: Path, name: str) -> np.ndarray:
    """uint8 ``[nouns, SIDE, SIDE, 4]``; all zero where the set lacks a noun."""
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("rendering the drawings needs resvg: pip install resvg-py") from error
    icons = _open_set(folder, name)
    sheet = np.zeros((len(NOUNS), SIDE, SIDE, 4), dtype=np.uint8)
    for number, noun in enumerate(NOUNS.values()):
        found = next((icon for icon in map(icons.get, noun.icons) if icon), None)
        if found is None:
            continue
        width, height = found["width"], found["height"]
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{SIDE}" height="{SIDE}">{found["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg)
        sheet[number] = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((SIDE, SIDE)))
    return sheet


def _open_set(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """The set's icons by name, each with ``body`` (SVG), ``width`` and ``height``."""
    files = sorted(folder.glob(f"iconify-json-{name}-[0-9]*.tgz"))
    if not files:
        raise UserError(f"{folder} lacks the drawings {name}: bash scripts/smollm2/drawings.sh {folder}")
    with tarfile.open(files[-1]) as archive:
        member = archive.extractfile("package/icons.json")
        assert member is not None
        content = json.load(member)
    size = {"width": content.get("width", 16), "height": content.get("height", content.get("width", 16))}
    icons = {key: {**size, **icon} for key, icon in content["icons"].items()}
    aliases = {key: icons[to["parent"]] for key, to in content.get("aliases", {}).items() if to["parent"] in icons}
    return {**aliases, **icons}
