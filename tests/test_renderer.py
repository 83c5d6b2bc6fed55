"""The pictures and questions of the shipped model: true, clear-cut, balanced, and never the same twice by seed."""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from tiny_llava import questions, renderer
from tiny_llava.renderer import COLORS, GLYPHS, SHAPES, Item, Scene, make_scene, patch_labels, render

RED_CIRCLE = Item("circle", "red", "large", (255, 0, 0), 24.0, 24.0, 26.0, 26.0)
BLUE_STAR = Item("star", "blue", "small", (0, 0, 255), 72.0, 72.0, 14.0, 14.0)
SCENE = Scene((240, 240, 240), (RED_CIRCLE, BLUE_STAR), None)


def scenes(count: int) -> list[Scene]:
    return [make_scene(random.Random(f"test/{k}")) for k in range(count)]


def test_a_scene_depends_on_its_generator_alone() -> None:
    one, same, other = (make_scene(random.Random(seed)) for seed in ("a", "a", "b"))
    assert one == same != other
    assert np.array_equal(np.asarray(render(one)), np.asarray(render(same)))


def test_things_stand_where_the_scene_says() -> None:
    pixels = np.asarray(render(SCENE)).astype(int)
    assert pixels.shape == (96, 96, 3)
    assert tuple(pixels[24, 24]) == (255, 0, 0)
    assert tuple(pixels[72, 72]) == (0, 0, 255)
    assert tuple(pixels[24, 72]) == (240, 240, 240)
    labels = patch_labels(SCENE).reshape(12, 12, -1)
    assert labels[3, 3].tolist() == [SHAPES.index("circle") + 1, list(COLORS).index("red") + 1, 0, 0, 3, 3, 1]
    assert labels[0, 11].tolist() == [0] * 7


def test_every_thing_has_one_centre_patch() -> None:
    """Those of rings and stars included: the patch under the centre may hold little of a thing, never none."""
    missing = wrong = total = 0
    for scene in scenes(200):
        things = len(scene.items) + (len(scene.text.text) if scene.text else 0)
        centres = int(patch_labels(scene)[:, renderer.CENTRE].sum())
        total += things
        wrong += centres > things
        missing += things - centres
    assert wrong == 0
    assert missing < 0.02 * total


def test_noun_phrases_are_found_with_all_they_fit() -> None:
    small = Item("circle", "blue", "small", (0, 0, 255), 70.0, 24.0, 14.0, 14.0)
    scene = Scene((240, 240, 240), (RED_CIRCLE, small), None)

    def found(text: str) -> list[tuple[str, int]]:
        return [(text[:end].split()[-1], len(items)) for end, items in questions.mentions(scene, text)]

    assert found("Is the red circle left of the small circle?") == [("circle", 1), ("circle", 1)]
    assert found("How many circles are there?") == [("circles", 2)]
    assert found("Is there a green cross in the picture?") == [("cross", 0)]
    assert found("Are there exactly two shapes?") == [("shapes", 2)]
    assert found("What color is at column3 row3?") == [("row3", 1)]
    assert found("What shape is at column8 row3?") == [("row3", 1)]
    assert found("Is the circle red?") == [("circle", 2)]
    assert found("What is written in the picture?") == []


def test_nothing_overlaps_or_leaves_the_picture() -> None:
    for scene in scenes(200):
        boxes = [item.box for item in scene.items] + ([scene.text.box] if scene.text else [])
        for number, (left, top, right, bottom) in enumerate(boxes):
            assert min(left, top) >= 0
            assert max(right, bottom) <= 96
            for other in boxes[:number]:
                assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_every_character_of_a_text_is_drawn_in_its_box() -> None:
    written = [scene for scene in scenes(120) if scene.text]
    assert len(written) > 40
    for scene in written:
        bare = np.asarray(render(Scene(scene.background, scene.items, None))).astype(int)
        drawn = np.abs(np.asarray(render(scene)).astype(int) - bare).max(axis=2) > 90
        assert scene.text is not None
        for left, top, right, bottom in scene.text.glyph_boxes:
            box = drawn[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
            assert box.sum() >= 12
            drawn[int(top) - 1 : int(bottom) + 2, int(left) - 1 : int(right) + 2] = False
        assert not drawn.any(), "ink outside the characters' boxes"


def answer_from_scene(scene: Scene, question: questions.Question) -> str | None:
    """An independent reading of the question's words; None for the kinds it does not read."""
    words = question.text.rstrip("?").split()

    def find(names: list[str]) -> list[Item]:
        return [
            item
            for item in scene.items
            if all(
                {
                    "shape": True,
                    item.shape: True,
                    item.shape + "s": True,
                    item.shape + "es": True,
                    "shapes": True,
                    item.color: True,
                    item.size: True,
                }.get(name, False)
                for name in names
            )
        ]

    if question.text.startswith(("What color is the", "What is the color of the")):
        (item,) = find(words[words.index("the", 3) + 1 :])
        return item.color
    if question.text.startswith("How many"):
        return questions.NUMBERS[len(find(words[2:-2]))]
    if question.text.startswith("Is there a "):
        return "yes" if find(words[3 : words.index("in")]) else "no"
    for way, holds in {
        "left": lambda a, b: a.cx < b.cx,
        "right": lambda a, b: a.cx > b.cx,
        "above": lambda a, b: a.cy < b.cy,
        "below": lambda a, b: a.cy > b.cy,
    }.items():
        if question.task == "relation" and question.structural == "verify" and way in words:
            (one,) = find(words[2 : words.index(way)])
            (other,) = find(words[len(words) - words[::-1].index("the") :])
            return "yes" if holds(one, other) else "no"
    return None


def test_answers_are_true() -> None:
    checked: Counter[str] = Counter()
    for number, scene in enumerate(scenes(300)):
        for question in questions.write_questions(scene, random.Random(number), 9):
            true = answer_from_scene(scene, question)
            if true is not None:
                assert question.answer == true, (question, scene)
                checked[question.task] += 1
    assert min(checked[task] for task in ("attribute", "count", "existence", "relation")) > 50


def test_wording_alone_does_not_tell_yes_from_no() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for number, scene in enumerate(scenes(2500)):
        for question in questions.write_questions(scene, random.Random(number), 9):
            if question.structural == "verify":
                answers[question.task][question.answer] += 1
    for task, counts in answers.items():
        total = sum(counts.values())
        assert total > 300, task
        assert abs(counts["yes"] / total - 0.5) < 0.06, (task, counts)


def test_relations_are_asked_only_where_they_are_clear() -> None:
    near = Item("cross", "red", "small", (255, 0, 0), 30.0, 80.0, 14.0, 14.0)
    pair = Scene((240, 240, 240), (RED_CIRCLE, near), None)  # 6 pixels apart from left to right, 56 from top to bottom
    asked = [questions.ask_relation(pair, random.Random(k)) for k in range(60)]
    assert any(asked)
    assert not any(question and ("left" in question.text or "right" in question.text) for question in asked)


@pytest.mark.parametrize("category", questions.MME_CATEGORIES)
def test_mme_pictures_have_one_yes_and_one_no(category: str) -> None:
    found = list(questions.mme_pictures(category, 12))
    assert len(found) == 12
    for _, yes, no in found:
        assert (yes.answer, no.answer) == ("yes", "no")
        assert yes.text.endswith("? Please answer yes or no.")


@pytest.mark.parametrize("category", questions.POPE_CATEGORIES)
def test_pope_pictures_alternate_present_and_absent(category: str) -> None:
    for scene, asked in questions.pope_pictures(category, 10):
        assert [question.answer for question in asked] == ["yes", "no"] * 3
        assert all(answer_from_scene(scene, question) == question.answer for question in asked)


def test_textvqa_pictures_offer_wrong_tokens_and_mostly_right_answers() -> None:
    offered: Counter[bool] = Counter()
    for scene, question, tokens, answers in questions.textvqa_pictures(80):
        assert scene.text is not None
        assert question.answer == scene.text.text
        assert len(answers) == 10
        assert answers.count(question.answer) >= 8
        offered.update(token == question.answer for token in tokens)
    assert offered[True] > 30
    assert offered[False] > 30


def test_gqa_pictures_have_every_type() -> None:
    types = {(q.structural, q.semantic) for _, asked in questions.gqa_pictures(60) for q in asked}
    assert {structural for structural, _ in types} == {"query", "verify", "choose"}
    assert {semantic for _, semantic in types} >= {"attr", "obj", "rel"}


def test_unknown_categories_are_named() -> None:
    with pytest.raises(ValueError, match="landmark"):
        next(questions.mme_pictures("landmark", 1))
    with pytest.raises(ValueError, match="hard"):
        next(questions.pope_pictures("hard", 1))
    with pytest.raises(ValueError, match="9"):
        make_scene(random.Random(0), items=9)


def test_texts_are_never_words_of_a_question() -> None:
    assert not set(GLYPHS) & set("aeiou")
    assert renderer.LABELS["glyph"] == len(GLYPHS) + 1
