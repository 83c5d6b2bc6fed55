"""Questions and true answers about a `Scene`, for training and for the small benchmarks.

Every answer is one lower-case word (a text of the picture is spelled in lower case). Yes and no, left and
right, above and below are drawn by lot before the question is built, so that the wording alone says nothing
about the answer. Only clear-cut cases are asked: centres differ by at least `CLEAR` pixels.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .renderer import COLORS, GLYPHS, SHAPES, SIDE, SIZES, Item, Scene, make_scene

INSTRUCTION = "Answer the question using a single word or phrase."
YES_NO = "Please answer yes or no."
NUMBERS = ("zero", "one", "two", "three", "four", "five")
CLEAR = 14  # pixels between two centres; half of it from the middle of the picture
MAX_COUNT = 4


@dataclass(frozen=True)
class Question:
    """A question, its answer, and its kinds.

    `task` is the family that accuracies are reported by; `structural` (query, verify, choose) and
    `semantic` (attr, obj, rel, global) are GQA's.
    """

    text: str
    answer: str
    task: str
    structural: str
    semantic: str


def _matching(scene: Scene, shape: str | None, color: str | None, size: str | None = None) -> list[Item]:
    return [
        item
        for item in scene.items
        if shape in (None, item.shape) and color in (None, item.color) and size in (None, item.size)
    ]


def _name(shape: str | None, color: str | None, size: str | None = None) -> str:
    return " ".join(word for word in (size, color, shape or "shape") if word)


def _references(scene: Scene, item: Item, *, color: bool = True, shape: bool = True) -> list[str]:
    """The ways to name this item that fit no other item of the scene; without its colour or shape if asked."""
    ways = [(item.shape, item.color)] * 2 + [(item.shape, None), (None, item.color)]
    names = []
    for by_shape, by_color in ways:
        if (by_color and not color) or (by_shape and not shape):
            continue
        if len(_matching(scene, by_shape, by_color)) == 1:
            names.append(_name(by_shape, by_color))
        elif not (color and shape) and len(_matching(scene, by_shape, by_color, item.size)) == 1:
            names.append(_name(by_shape, by_color, item.size))
    return names


def _refer(scene: Scene, item: Item, rng: random.Random, **without: bool) -> str | None:
    names = _references(scene, item, **without)
    return rng.choice(names) if names else None


_MENTION = re.compile(
    rf"(?<=\s)(?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<color>{'|'.join(COLORS)}) )?"
    rf"(?P<shape>{'|'.join(SHAPES)}|shape)(?:es|s)?\b(?! is at)"
    r"|at column(?P<column>\d+) row(?P<row>\d+)"
)


def mentions(scene: Scene, text: str) -> list[tuple[int, list[Item]]]:
    """Every noun phrase of a question: where it ends in the text, and the things of the scene that it fits."""
    found = []
    for match in _MENTION.finditer(text):
        if match["column"]:
            here = [item for item in scene.items if f"at {_grid(item.cx, item.cy)}" == match[0]]
        else:
            shape = None if match["shape"] == "shape" else match["shape"]
            here = _matching(scene, shape, match["color"], match["size"])
        found.append((match.end(), here))
    return found


def _yes(rng: random.Random) -> bool:
    return rng.random() < 0.5


def _word(value: bool) -> str:
    return "yes" if value else "no"


def _place(rng: random.Random) -> str:
    return rng.choice(("in the picture", "in the image"))


def ask_attribute(scene: Scene, rng: random.Random) -> Question | None:
    """What colour, which shape, small or large."""
    item = rng.choice(scene.items)
    kind = rng.choice(("color", "shape", "size"))
    if kind == "color":
        name = _refer(scene, item, rng, color=False)
        text = rng.choice(("What color is the {}?", "What is the color of the {}?"))
        answer, structural = item.color, "query"
    elif kind == "shape":
        name = _refer(scene, item, rng, shape=False)
        text, answer, structural = "What is the {}?", item.shape, "query"
    else:
        name = _refer(scene, item, rng)
        text, answer, structural = "Is the {} small or large?", item.size, "choose"
    return Question(text.format(name), answer, "attribute", structural, "attr") if name else None


def ask_color(scene: Scene, rng: random.Random, yes: bool | None = None) -> Question | None:
    """Whether a thing has a colour; half of the wrong colours stand elsewhere in the picture."""
    yes = _yes(rng) if yes is None else yes
    item = rng.choice(scene.items)
    name = _refer(scene, item, rng, color=False)
    if not name:
        return None
    present = [other.color for other in scene.items if other.color != item.color]
    absent = [color for color in COLORS if color != item.color]
    wrong = rng.choice(present) if present and rng.random() < 0.5 else rng.choice(absent)
    return Question(f"Is the {name} {item.color if yes else wrong}?", _word(yes), "color", "verify", "attr")


def ask_existence(scene: Scene, rng: random.Random, yes: bool | None = None) -> Question | None:
    """Whether there is such a thing; wrong things are put together from shapes and colours that are there."""
    yes = _yes(rng) if yes is None else yes
    place = _place(rng)
    if rng.random() < 0.1 and (scene.text is not None) == yes:
        return Question(f"Is there text {place}?", _word(yes), "existence", "verify", "global")
    by_shape, by_color = rng.choice(((True, True), (True, False), (False, True)))
    if yes:
        item = rng.choice(scene.items)
        wanted = (item.shape if by_shape else None, item.color if by_color else None)
    else:
        here = by_shape and by_color and rng.random() < 0.6
        shapes = [item.shape for item in scene.items] if here else list(SHAPES)
        colors = [item.color for item in scene.items] if here else list(COLORS)
        pairs = [(shape if by_shape else None, color if by_color else None) for shape in shapes for color in colors]
        absent = [pair for pair in pairs if not _matching(scene, *pair)]
        if not absent:  # every pairing of what is there is there
            return ask_existence(scene, rng, yes=False)
        wanted = rng.choice(absent)
    return Question(f"Is there a {_name(*wanted)} {place}?", _word(yes), "existence", "verify", "obj")


def _plural(shape: str | None, color: str | None) -> str:
    name = _name(shape, color)
    return name + ("es" if name.endswith("ss") else "s")


def _countable(scene: Scene, rng: random.Random) -> tuple[str, int] | None:
    """Something to count, its number from 0 to 4 chosen evenly among those that the scene offers."""
    kinds = [(None, None)]
    kinds += [(shape, None) for shape in SHAPES]
    kinds += [(None, color) for color in COLORS]
    kinds += sorted({(item.shape, item.color) for item in scene.items})
    by_count: dict[int, list] = {}
    for kind in kinds:
        by_count.setdefault(len(_matching(scene, *kind)), []).append(kind)
    counts = [count for count in by_count if count <= MAX_COUNT]
    if not counts:
        return None
    count = rng.choice([c for c in counts if c > 1] or counts) if rng.random() < 0.5 else rng.choice(counts)
    return _plural(*rng.choice(by_count[count])), count


def ask_count(scene: Scene, rng: random.Random, yes: bool | None = None) -> Question | None:
    """How many, or whether there are so many (always if `yes` is given)."""
    found = _countable(scene, rng)
    if not found:
        return None
    name, count = found
    if yes is None and rng.random() < 0.7:
        return Question(f"How many {name} are there?", NUMBERS[count], "count", "query", "obj")
    yes = _yes(rng) if yes is None else yes
    near = [other for other in (count - 1, count + 1) if 0 <= other <= MAX_COUNT]
    said = count if yes else rng.choice(near)
    return Question(f"Are there exactly {NUMBERS[said]} {name}?", _word(yes), "count", "verify", "obj")


def _sides(axis: int) -> tuple[str, str]:
    return ("left", "right") if axis == 0 else ("top", "bottom")


def ask_position(scene: Scene, rng: random.Random, yes: bool | None = None) -> Question | None:
    """In which half of the picture a thing stands."""
    axis = rng.randrange(2)
    item = rng.choice(scene.items)
    value = (item.cx, item.cy)[axis] - SIDE / 2
    name = _refer(scene, item, rng)
    if not name or abs(value) < CLEAR / 2:
        return None
    sides = _sides(axis)
    true = sides[value > 0]
    if yes is None and rng.random() < 0.5:
        return Question(f"Is the {name} on the {sides[0]} or on the {sides[1]}?", true, "position", "choose", "rel")
    yes = _yes(rng) if yes is None else yes
    said = true if yes else sides[value <= 0]
    return Question(f"Is the {name} on the {said} side?", _word(yes), "position", "verify", "rel")


def ask_relation(scene: Scene, rng: random.Random, yes: bool | None = None) -> Question | None:
    """How two things stand to each other."""
    if len(scene.items) < 2:
        return None
    first, second = rng.sample(scene.items, 2)
    axis = rng.randrange(2)
    value = (second.cx - first.cx, second.cy - first.cy)[axis]
    one, other = _refer(scene, first, rng), _refer(scene, second, rng)
    if not one or not other or abs(value) < CLEAR:
        return None
    ways = ("left of", "right of") if axis == 0 else ("above", "below")
    true = value < 0  # False: the first way is right
    if yes is None and rng.random() < 0.5:
        text = f"Is the {one} {ways[0].split()[0]} or {ways[1]} the {other}?"
        return Question(text, ways[true].split()[0], "relation", "choose", "rel")
    yes = _yes(rng) if yes is None else yes
    said = ways[true if yes else not true]
    return Question(f"Is the {one} {said} the {other}?", _word(yes), "relation", "verify", "rel")


def ask_grid(scene: Scene, rng: random.Random) -> Question | None:
    """For training only: where a thing is, by column and row; says more about places than yes and no do."""
    item = rng.choice(scene.items)
    name = _refer(scene, item, rng)
    return (
        Question(f"What is the column and row of the {name}?", _grid(item.cx, item.cy), "grid", "", "")
        if name
        else None
    )


def ask_at(scene: Scene, rng: random.Random) -> Question | None:
    """For training only: the colour or shape of the thing at a place."""
    item = rng.choice(scene.items)
    kind, answer = rng.choice((("color", item.color), ("shape", item.shape)))
    return Question(f"What {kind} is at {_grid(item.cx, item.cy)}?", answer, "grid", "", "")


def ask_text(scene: Scene, rng: random.Random) -> Question | None:
    """What the text says."""
    if not scene.text:
        return None
    text = rng.choice(("What is written {}?", "What does the text {} say?")).format(_place(rng))
    return Question(text, scene.text.text, "text", "query", "obj")


def _misread(text: str, rng: random.Random) -> str:
    """The text with one character read wrongly."""
    place = rng.randrange(len(text))
    other = rng.choice([glyph for glyph in GLYPHS if glyph != text[place]])
    return text[:place] + other + text[place + 1 :]


def ask_spelling(scene: Scene, rng: random.Random, yes: bool | None = None) -> Question | None:
    """Whether the text says this; a wrong one differs in one character or in all."""
    if not scene.text:
        return None
    yes = _yes(rng) if yes is None else yes
    said = scene.text.text
    if not yes:
        said = _misread(said, rng)
        if rng.random() < 0.5:
            said = "".join(rng.choice([g for g in GLYPHS if g != true]) for true in scene.text.text)
    return Question(f"Does the text say {said}?", _word(yes), "spelling", "verify", "obj")


def reference_tokens(scene: Scene, rng: random.Random) -> list[str]:
    """What an OCR program might have read: mostly the text among wrong readings, sometimes only wrong, or none."""
    if not scene.text:
        return []
    true, lot = scene.text.text, rng.random()
    if lot < 0.1:
        return []
    tokens = [_misread(true, rng) for _ in range(rng.randint(0, 2))]
    if lot < 0.8 or not tokens:
        tokens.append(true)
    rng.shuffle(tokens)
    return list(dict.fromkeys(tokens))


def with_reference(question: Question, tokens: list[str]) -> Question:
    """The question followed by TextVQA's line of OCR tokens."""
    text = f"{question.text}\nReference OCR token: {', '.join(tokens)}"
    return Question(text, question.answer, "text_ocr", question.structural, question.semantic)


def ask_text_with_reference(scene: Scene, rng: random.Random) -> Question | None:
    """What the text says, with a line of OCR tokens that may be wrong."""
    question = ask_text(scene, rng)
    return with_reference(question, reference_tokens(scene, rng)) if question else None


WRITERS: dict[Callable[[Scene, random.Random], Question | None], float] = {
    ask_attribute: 2.2,
    ask_color: 0.9,
    ask_existence: 1.0,
    ask_count: 2.4,
    ask_position: 1.6,
    ask_relation: 2.6,
    ask_text: 1.8,
    ask_spelling: 0.4,
    ask_text_with_reference: 0.4,
    ask_grid: 0.6,
    ask_at: 0.6,
}
TRAINING_ONLY = (ask_grid, ask_at)
TASKS = ("attribute", "color", "existence", "count", "position", "relation", "text", "spelling", "text_ocr")


def write_questions(scene: Scene, rng: random.Random, count: int, training: bool = False) -> list[Question]:
    """At most `count` different questions about the scene, families drawn by the weights in `WRITERS`.

    Families that are only a means to learn the others are asked with `training`.
    """
    asked = {writer: weight for writer, weight in WRITERS.items() if training or writer not in TRAINING_ONLY}
    writers, weights = list(asked), list(asked.values())
    questions: dict[str, Question] = {}
    for _ in range(4 * count):
        if len(questions) == count:
            break
        question = rng.choices(writers, weights)[0](scene, rng)
        if question:
            questions.setdefault(question.text, question)
    return list(questions.values())


def describe(scene: Scene, rng: random.Random) -> str:
    """The scene in words, things in any order, places by column and row of the 12×12 grid."""
    parts = [
        f"a {item.size} {item.color} {item.shape} at {_grid(item.cx, item.cy)}"
        for item in rng.sample(scene.items, len(scene.items))
    ]
    if scene.text:
        left, top, right, bottom = scene.text.box
        place = _grid((left + right) / 2, (top + bottom) / 2)
        parts.insert(rng.randint(0, len(parts)), f"the {scene.text.color} text {scene.text.text} at {place}")
    return ", ".join(parts)


def _grid(x: float, y: float) -> str:
    return f"column{int(x // 8)} row{int(y // 8)}"


# --- the small benchmarks: pictures of their own seeds, which training never draws --------------------------


def held_out(name: str, seed: int, index: int) -> random.Random:
    """The generator of picture `index` of a held-out set; training's generators start with another word."""
    return random.Random(f"held-out/{name}/{seed}/{index}")


def _first(ask: Callable[..., Question | None], scene: Scene, rng: random.Random, **how: bool) -> Question | None:
    return next((question for _ in range(30) if (question := ask(scene, rng, **how))), None)


def gqa_pictures(count: int, seed: int = 0) -> Iterator[tuple[Scene, list[Question]]]:
    """GQA-shaped: attributes (query, choose, verify), positions and relations (choose, verify), existence.

    Yields `count` scenes, each with two to four questions that carry GQA's structural and semantic types.
    """
    asks = (ask_attribute, ask_attribute, ask_color, ask_existence, ask_position, ask_relation, ask_relation)
    for index in range(count):
        rng = held_out("gqa", seed, index)
        scene = make_scene(rng, items=rng.randint(2, 5), repeats=rng.random() < 0.2)
        found = [_first(ask, scene, rng) for ask in rng.sample(asks, 4)]
        questions = list({question.text: question for question in found if question}.values())
        if questions:
            yield scene, questions


MME_CATEGORIES = ("existence", "count", "position", "color", "OCR")


def mme_pictures(category: str, count: int, seed: int = 0) -> Iterator[tuple[Scene, Question, Question]]:
    """MME-shaped: `count` scenes of a category, each with one question to answer yes and one to answer no.

    The texts end in " Please answer yes or no.", as MME's do. Raises ValueError for an unknown category.
    """
    asks = dict(zip(MME_CATEGORIES, (ask_existence, ask_count, ask_mme_position, ask_color, ask_spelling), strict=True))
    if category not in asks:
        raise ValueError(f"unknown MME category {category!r}; known: {', '.join(asks)}")
    index = made = 0
    while made < count:
        rng = held_out(f"mme/{category}", seed, index)
        index += 1
        scene = make_scene(rng, text=True if category == "OCR" else None)
        pair = [_first(asks[category], scene, rng, yes=yes) for yes in (True, False)]
        if pair[0] and pair[1]:
            made += 1
            yes, no = (Question(f"{q.text} {YES_NO}", q.answer, q.task, q.structural, q.semantic) for q in pair if q)
            yield scene, yes, no


def ask_mme_position(scene: Scene, rng: random.Random, yes: bool | None = None) -> Question | None:
    """MME's position questions: a side of the picture, or two things to each other."""
    return (ask_position if len(scene.items) < 2 or rng.random() < 0.5 else ask_relation)(scene, rng, yes)


def textvqa_pictures(count: int, seed: int = 0) -> Iterator[tuple[Scene, Question, list[str], list[str]]]:
    """TextVQA-shaped: `count` scenes with a text.

    Yields scene, question (without OCR line), OCR tokens (some wrong, perhaps none) and ten people's answers
    (eight to ten of them right, the others misread).
    """
    for index in range(count):
        rng = held_out("textvqa", seed, index)
        scene = make_scene(rng, text=True)
        while scene.text is None:
            scene = make_scene(rng, items=1, text=True)
        question = ask_text(scene, rng)
        assert question is not None
        wrong = rng.choice((0, 0, 1, 2))
        answers = [_misread(scene.text.text, rng) for _ in range(wrong)] + [scene.text.text] * (10 - wrong)
        rng.shuffle(answers)
        yield scene, question, reference_tokens(scene, rng), answers


POPE_CATEGORIES = ("random", "popular", "adversarial")


def pope_pictures(category: str, count: int, seed: int = 0) -> Iterator[tuple[Scene, list[Question]]]:
    """POPE-shaped: `count` scenes, each with three things that are there and three that are not, in turn.

    What is absent is any thing (`random`), one of the shapes of any colour most often asked for (`popular`),
    or put together from a shape and a colour that are both in the picture (`adversarial`). Raises ValueError
    for an unknown category.
    """
    if category not in POPE_CATEGORIES:
        raise ValueError(f"unknown POPE category {category!r}; known: {', '.join(POPE_CATEGORIES)}")
    made = index = 0
    while made < count:
        rng = held_out("pope", seed, index)
        index += 1
        scene = make_scene(rng, items=rng.randint(3, 5), repeats=False)
        there = sorted({(item.shape, item.color) for item in scene.items})
        shapes, colors = sorted({shape for shape, _ in there}), sorted({color for _, color in there})
        if category == "adversarial":
            pool = [(shape, color) for shape in shapes for color in colors]
        elif category == "popular":
            pool = [(shape, color) for shape in SHAPES[:3] for color in COLORS]
        else:
            pool = [(shape, color) for shape in SHAPES for color in COLORS]
        absent = [pair for pair in pool if pair not in there]
        if len(there) < 3 or len(absent) < 3:
            continue
        made += 1
        questions = []
        for yes, no in zip(rng.sample(there, 3), rng.sample(absent, 3), strict=True):
            for pair, answer in ((yes, "yes"), (no, "no")):
                text = f"Is there a {_name(*pair)} in the image?"
                questions.append(Question(text, answer, "existence", "verify", "obj"))
        yield scene, questions
