"""Pictures and questions that ship: the shipped model answers them, and says when it is asked something else."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from llava.constants import SHIPPED_MODEL_PATH
from llava.examples import FOLDER, example_named, examples, outside_its_world
from llava.inference import GenerationOptions, LoadedModel, Turn, open_checkpoint
from llava.utils import UserError


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return LoadedModel(open_checkpoint(SHIPPED_MODEL_PATH))


def test_every_example_is_answered_rightly_and_is_of_the_models_world(model):
    checkpoint = model.checkpoint
    shown = examples()
    prompts = [checkpoint.encode([Turn(each.question, [checkpoint.read_picture(each.image)])]) for each in shown]
    answers = model.answer_batch(prompts, checkpoint.pruning_config(), GenerationOptions(8))
    assert [answer.text for answer in answers] == [each.answer for each in shown]
    for each in shown:
        assert outside_its_world(checkpoint, each.question, [Image.open(each.image)]) is None
    assert {each.image for each in shown} == set(FOLDER.glob("*.png"))
    assert len({each.name for each in shown}) == len(shown) and example_named("sign") == shown[0]


def test_questions_that_ship_are_of_the_models_world(model):
    for line in (FOLDER / "questions.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert outside_its_world(model.checkpoint, record["text"], [Image.open(FOLDER / record["image"])]) is None


def test_other_questions_and_pictures_are_told(model):
    plain = Image.open(FOLDER / "scene_2.png")
    busy = Image.effect_noise((200, 100), 80)
    for question, picture, reason in (
        ("Is there a dog?", plain, "'dog' is no word of its training"),
        ("What is this?", plain, "'this' is no word"),
        ("Describe the image in detail.", plain, "'Describe', 'detail' are no words"),
        ("What color is the circle?", busy, "plain ground"),
    ):
        why = outside_its_world(model.checkpoint, question, [picture])
        assert reason in why and why.count(" ground") == (picture is busy) and "\n" not in why
    assert "without a picture" in outside_its_world(model.checkpoint, "What color is the circle?", [])


def test_an_unknown_example_is_refused():
    with pytest.raises(UserError, match="there is no example 'x'; there are sign, count"):
        example_named("x")
