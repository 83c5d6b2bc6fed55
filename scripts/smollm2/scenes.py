"""Scenes: what stands where on which background, and the picture of it.

A scene depends on its seed alone. Training never shows two of ``NEVER_TOGETHER`` in one picture, nor a composition (the
set of two or more kinds of things) that a hash keeps for testing; held-out scenes are made of exactly these.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .drawings import Drawings
from .nouns import NEVER_TOGETHER, NOUNS

SIDE = 192
"""Pixels a side of a picture."""

MOST = 6
"""Things in a picture, at most."""

COLORS = {
    "white": (250, 250, 248),
    "gray": (150, 152, 156),
    "black": (28, 28, 32),
    "red": (206, 62, 58),
    "orange": (240, 150, 62),
    "yellow": (246, 222, 92),
    "green": (92, 172, 98),
    "blue": (84, 138, 216),
    "purple": (142, 92, 178),
    "pink": (244, 168, 194),
    "brown": (134, 92, 62),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")


@dataclass(frozen=True)
class Thing:
    """One drawn thing.

    ``x`` and ``y`` are its centre and ``size`` its longer side, all as shares of the picture's side; ``drawing`` says
    which of the noun's drawings, ``turn`` how far it is turned (degrees).
    """

    noun: str
    x: float
    y: float
    size: float
    drawing: int
    turn: float
    mirrored: bool


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Later things are drawn over earlier ones, which they hardly touch."""

    color: str
    pattern: str
    things: tuple[Thing, ...]
    seed: int

    @property
    def counts(self) -> dict[str, int]:
        """How many of each noun, from left to right."""
        counts: dict[str, int] = {}
        for thing in sorted(self.things, key=lambda thing: thing.x):
            counts[thing.noun] = counts.get(thing.noun, 0) + 1
        return counts


def is_held_out(nouns: set[str]) -> bool:
    """Whether pictures of exactly these kinds of things are kept for testing: one composition in ten, and every one
    with two of ``NEVER_TOGETHER``."""
    if len(nouns) < 2:
        return False
    digest = hashlib.sha256(" ".join(sorted(nouns)).encode()).digest()
    return len(nouns & NEVER_TOGETHER) > 1 or digest[0] % 10 == 0


def make_scene(seed: int, held_out: bool = False, drawings_of_a_noun: int = 5) -> Scene:
    """A scene of training or, for ``held_out``, of testing; one in six shows a single thing."""
    rng = random.Random(f"{'held out' if held_out else 'scene'} {seed}")
    color, pattern = rng.choice(list(COLORS)), rng.choice(("plain", "plain", *PATTERNS))
    while True:
        number = rng.choice((1, 2, 2, 3, 4, 4, 5, 6))
        names = _pick_nouns(rng, number, held_out)
        if is_held_out(set(names)) == (held_out and len(set(names)) > 1):
            break
    while (things := _place(rng, names, drawings_of_a_noun)) is None:
        pass
    return Scene(color, pattern, tuple(things), seed)


def make_crowd(seed: int, drawings_of_a_noun: int = 5) -> Scene:
    """A picture full of things, for the tower's training alone: most of its patches show one, none are asked about.

    At most one of ``NEVER_TOGETHER`` is among them; with nine things and more it is no composition that is tested.
    """
    rng = random.Random(f"crowd {seed}")
    side = rng.choice((3, 4))
    rare = rng.choice(sorted(NEVER_TOGETHER))
    pool = [name for name in NOUNS if name == rare or name not in NEVER_TOGETHER]
    # The one of the twenty comes as often as it would among all nouns.
    weights = [len(NEVER_TOGETHER) if name == rare else 1 for name in pool]
    things = []
    for cell in range(side * side):
        size = rng.uniform(0.75, 1.1) / side
        x, y = ((place + 0.5 + rng.uniform(-0.15, 0.15)) / side for place in (cell % side, cell // side))
        (noun,) = rng.choices(pool, weights)
        turn, mirrored = rng.uniform(-14, 14), rng.random() < 0.5
        things.append(Thing(noun, x, y, size, rng.randrange(drawings_of_a_noun), turn, mirrored))
    rng.shuffle(things)
    return Scene(rng.choice(list(COLORS)), rng.choice(("plain", *PATTERNS)), tuple(things), seed)


def _pick_nouns(rng: random.Random, number: int, held_out: bool) -> list[str]:
    """As many names, often some of them alike so that there is something to count."""
    kinds = number if number < 3 or rng.random() < 0.45 else rng.randint(1, number - 1)
    if number == 2 and rng.random() < 0.3:
        kinds = 1
    pool = list(NOUNS)
    if held_out and kinds > 1 and rng.random() < 0.5:
        rare = rng.sample(sorted(NEVER_TOGETHER), 2)
        chosen = rare + rng.sample([name for name in pool if name not in rare], kinds - 2)
    else:
        chosen = rng.sample(pool, kinds)
    names = chosen + [rng.choice(chosen[: 1 + kinds // 2]) for _ in range(number - kinds)]
    rng.shuffle(names)
    return names


def _place(rng: random.Random, names: list[str], drawings: int) -> list[Thing] | None:
    """Centres far enough apart; None if the dice fell badly."""
    low, high = {1: (0.35, 0.8), 2: (0.28, 0.5), 3: (0.24, 0.42), 4: (0.22, 0.36)}.get(len(names), (0.2, 0.31))
    things: list[Thing] = []
    for name in names:
        for _ in range(40):
            size = rng.uniform(low, high)
            # A bit of a thing may lie outside the picture.
            x, y = (rng.uniform(0.42 * size, 1 - 0.42 * size) for _ in range(2))
            if all(max(abs(x - other.x), abs(y - other.y)) > 0.46 * (size + other.size) for other in things):
                break
        else:
            return None
        things.append(Thing(name, x, y, size, rng.randrange(drawings), rng.uniform(-14, 14), rng.random() < 0.5))
    return things


def render(scene: Scene, drawings: Drawings, side: int = SIDE) -> tuple[Image.Image, np.ndarray]:
    """The picture (RGB) and int64 ``[side, side]``: the number of the thing that each pixel shows, from 1; 0: none."""
    picture = _background(scene, side)
    shown = Image.new("L", (side, side), 0)
    for number, thing in enumerate(scene.things, 1):
        choices = drawings.of(thing.noun)
        drawing = choices[thing.drawing % len(choices)]
        if thing.mirrored:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = max(8, round(thing.size * side))
        drawing = drawing.resize((pixels, pixels), Image.Resampling.BILINEAR, reducing_gap=2.0)
        drawing = drawing.rotate(thing.turn, Image.Resampling.BILINEAR, expand=True)
        corner = (round(thing.x * side - drawing.width / 2), round(thing.y * side - drawing.height / 2))
        picture.paste(drawing, corner, drawing)
        shown.paste(number, corner, drawing.getchannel("A").point(lambda value: 255 * (value > 127)))
    return picture, np.asarray(shown, dtype=np.int64)


def _background(scene: Scene, side: int) -> Image.Image:
    """The colour, varied a little, and a pattern of a lighter or darker shade of it."""
    rng = random.Random(f"background {scene.seed}")
    base = np.array(COLORS[scene.color], dtype=np.float32)
    base = np.clip(base + [rng.uniform(-14, 14) for _ in range(3)], 0, 255)
    shade = np.clip(base + rng.choice((-1, 1)) * rng.uniform(20, 34), 0, 255)
    if np.abs(shade - base).max() < 18:  # there is no lighter white
        shade = base + (30 if base.mean() < 128 else -30)
    y, x = np.mgrid[:side, :side].astype(np.float32) * (192 / side)
    step = rng.uniform(20, 34)
    if scene.pattern == "striped":
        across = rng.choice((x, y, (x + y) * 0.7))
        marked = (across % step) < step / 2
    elif scene.pattern == "dotted":
        marked = np.hypot(x % step - step / 2, y % step - step / 2) < step * 0.27
    elif scene.pattern == "checkered":
        marked = ((x // step) + (y // step)) % 2 < 1
    else:
        marked = np.zeros((side, side), dtype=bool)
    return Image.fromarray(np.where(marked[..., None], shade, base).astype(np.uint8))
