"""Questions about a scene, each with a short answer and one in a sentence.

The words behind "Answer the question using a single word or phrase." ask for the short one, as in LLaVA's data.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from .nouns import CATEGORIES, NOUNS
from .scenes import PATTERNS, Scene, Thing

MARGIN = 0.05
"""How far from the border of two answers a thing must lie (share of the picture's side) to be asked about."""

APART = 0.18
"""How far two things must be apart to be asked which is where."""

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_CATEGORY_NAMES = {
    "clothing": "piece of clothing",
    "furniture": "piece of furniture",
    "instrument": "musical instrument",
    "food": "food",
}
_NAMED = tuple(category for category in CATEGORIES if category != "thing")


@dataclass(frozen=True)
class Question:
    """What is asked, of which kind, and both answers."""

    kind: str
    text: str
    short: str
    sentence: str


KINDS = ("what", "existence", "color", "pattern", "count", "total", "relation", "where", "at", "category", "list")
"""Kinds that have one right short answer (``list``: one right set)."""

_WEIGHTS = {"relation": 3, "where": 2, "count": 2, "existence": 2, "at": 1, "category": 1, "total": 1}


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """All that can be asked of a scene, each with one of its wordings, in random order."""
    asked = [*_about_all(scene, rng), *_existence(scene, rng), *_about_places(scene, rng), *_relations(scene, rng)]
    rng.shuffle(asked)
    return asked


def conversation(scene: Scene, rng: random.Random, most: int = 9) -> tuple[bool, list[Question]]:
    """Whether answers are short, and up to ``most`` questions, kinds mixed; a description, if any, comes last."""
    short = rng.random() < 0.7
    by_kind: dict[str, list[Question]] = {}
    for question in questions(scene, rng):
        by_kind.setdefault(question.kind, []).append(question)
    description = by_kind.pop("caption")
    chosen = [question for kind, found in by_kind.items() for question in found[: _WEIGHTS.get(kind, 1)]]
    rng.shuffle(chosen)
    chosen = chosen[: most - (not short)]
    # A list gives the rest away.
    chosen.sort(key=lambda question: question.kind == "list")
    return short, chosen + ([] if short else description)


def _pick(rng: random.Random, *texts: str) -> str:
    return rng.choice(texts)


def some(noun: str, count: int) -> str:
    """``two dogs``, ``an apple``."""
    entry = NOUNS[noun]
    return entry.with_article if count == 1 else f"{_NUMBERS[count]} {entry.plural}"


def joined(parts: list[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _start(text: str) -> str:
    return text[0].upper() + text[1:]


def _it_is(noun: str) -> str:
    entry = NOUNS[noun]
    return f"{'They are' if entry.is_plural else 'It is'} {entry.with_article}."


def _there_is(noun: str) -> str:
    entry = NOUNS[noun]
    return f"there {entry.verb} {entry.with_article}"


def background(scene: Scene) -> str:
    """``a striped blue background``."""
    pattern = "" if scene.pattern == "plain" else scene.pattern + " "
    words = f"{pattern}{scene.color} background"
    return ("an " if words[0] in "aeiou" else "a ") + words


def description(scene: Scene) -> str:
    """A caption of one sentence."""
    return _start(joined([some(noun, count) for noun, count in scene.counts.items()])) + f" on {background(scene)}."


def _about_all(scene: Scene, rng: random.Random) -> Iterator[Question]:
    counts, total = scene.counts, len(scene.things)
    text = _pick(rng, "Describe the picture.", "What does the picture show?", "Write a caption for this picture.")
    yield Question("caption", text, description(scene), description(scene))
    if total == 1:
        (noun,) = counts
        text = _pick(rng, "What is this?", "What is in the picture?", "What do you see?")
        yield Question("what", text, noun, _it_is(noun))
    text = _pick(rng, "What color is the background?", "What is the color of the background?")
    yield Question("color", text, scene.color, f"The background is {scene.color}.")
    text = _pick(
        rng, f"Is the background {', '.join(PATTERNS[:-1])} or {PATTERNS[-1]}?", "What pattern has the background?"
    )
    yield Question("pattern", text, scene.pattern, f"The background is {scene.pattern}.")
    text = _pick(rng, "How many things are in the picture?", "How many things are there in all?")
    sentence = "There is one thing." if total == 1 else f"There are {_NUMBERS[total]} things."
    yield Question("total", text, str(total), sentence)
    if len(counts) > 1:
        text = _pick(
            rng, "What things are in the picture?", "List the things in the picture.", "Which things do you see?"
        )
        sentence = f"I see {joined([some(noun, count) for noun, count in counts.items()])}."
        yield Question("list", text, ", ".join(counts), sentence)
    repeated = [noun for noun, count in counts.items() if count > 1]
    for noun in dict.fromkeys(repeated + rng.sample(list(counts), 1)):
        count, plural = counts[noun], NOUNS[noun].plural
        text = _pick(rng, f"How many {plural} are there?", f"How many {plural} are in the picture?")
        is_one = count == 1 and not NOUNS[noun].is_plural
        sentence = f"There {'is' if is_one else 'are'} {_NUMBERS[count]} {noun if count == 1 else plural}."
        yield Question("count", text, str(count), sentence)
    yield from _categories(counts, rng)


def _categories(counts: dict[str, int], rng: random.Random) -> Iterator[Question]:
    category = rng.choice(_NAMED)
    own = [noun for noun in counts if NOUNS[noun].category == category]
    if own or rng.random() < 0.4:
        name = _CATEGORY_NAMES.get(category, category)
        name = name if category == "food" else ("an " if name[0] in "aeiou" else "a ") + name
        found = (
            f"Yes, {_there_is(own[0])}." if own else f"No, there is no {name.removeprefix('an ').removeprefix('a ')}."
        )
        yield Question("category", f"Is there {name} in the picture?", "Yes" if own else "No", found)
    for category in _NAMED:
        own = [noun for noun in counts if NOUNS[noun].category == category]
        if len(own) == 1 and len(counts) > 1:
            name = _CATEGORY_NAMES.get(category, category)
            text = _pick(rng, f"Which {name} is in the picture?", f"Which {name} do you see?")
            yield Question("category", text, own[0], _it_is(own[0]))


def _existence(scene: Scene, rng: random.Random) -> Iterator[Question]:
    counts = scene.counts
    present = rng.choice(list(counts))
    # Half of those that are absent are of a kind with something that is there.
    near = [name for name in NOUNS if name not in counts and NOUNS[name].category == NOUNS[present].category]
    absent = rng.choice(near if rng.random() < 0.5 else [name for name in NOUNS if name not in counts])
    for noun, answer in ((present, "Yes"), (absent, "No")):
        entry = NOUNS[noun]
        start = _start(entry.verb)
        text = _pick(rng, f"{start} there {entry.with_article} in the picture?", f"Do you see {entry.with_article}?")
        sentence = f"Yes, {_there_is(noun)}." if answer == "Yes" else f"No, there {entry.verb} no {noun}."
        yield Question("existence", text, answer, sentence)


def place_of(thing: Thing) -> str:
    """``top left``, ``top``, ``top right``, …, by the third of the picture that its centre lies in."""
    words = (("top", "", "bottom")[int(thing.y * 3)], ("left", "", "right")[int(thing.x * 3)])
    return " ".join(word for word in words if word) or "center"


def _is_clear(thing: Thing) -> bool:
    return all(min(abs(value - 1 / 3), abs(value - 2 / 3)) >= MARGIN for value in (thing.x, thing.y))


def _about_places(scene: Scene, rng: random.Random) -> Iterator[Question]:
    counts = scene.counts
    places = [place_of(thing) for thing in scene.things]
    for thing, place in zip(scene.things, places, strict=True):
        if not _is_clear(thing):
            continue
        is_corner = " " in place
        where = "in the center" if place == "center" else f"at the {place}"
        if counts[thing.noun] == 1:
            verb = NOUNS[thing.noun].verb
            text = _pick(rng, f"Where {verb} the {thing.noun}?", f"Where in the picture {verb} the {thing.noun}?")
            yield Question("where", text, place, f"The {thing.noun} {verb} {where}.")
        if places.count(place) == 1:
            text = f"What is in the {place} corner?" if is_corner else f"What is {where}?"
            yield Question("at", text, thing.noun, _it_is(thing.noun))


def _relations(scene: Scene, rng: random.Random) -> Iterator[Question]:
    counts = scene.counts
    single = [thing for thing in scene.things if counts[thing.noun] == 1]
    for first in single:
        for second in single:
            if first.noun == second.noun:
                continue
            pair = []
            if abs(first.x - second.x) >= APART:
                pair.append(("to the left of", "to the right of", "left" if first.x < second.x else "right"))
            if abs(first.y - second.y) >= APART:
                pair.append(("above", "below", "above" if first.y < second.y else "below"))
            for one, other, answer in pair:
                yield _relation(first.noun, second.noun, one, other, answer, rng)


def _relation(first: str, second: str, one: str, other: str, answer: str, rng: random.Random) -> Question:
    true, verb = (one if answer in one else other), NOUNS[first].verb
    if rng.random() < 0.6:
        text = f"{_start(verb)} the {first} {one.removesuffix(' of')} or {other} the {second}?"
        return Question("relation", text, answer, f"The {first} {verb} {true} the {second}.")
    asked = rng.choice((one, other))
    said = "Yes" if asked == true else "No"
    text = f"{_start(verb)} the {first} {asked} the {second}?"
    return Question("relation", text, said, f"{said}, the {first} {verb} {true} the {second}.")
