"""The shipped model, requests of all kinds for it, and the answers to them alone."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from llava.constants import SHIPPED_MODEL_PATH
from llava.inference import Answer, GenerationOptions, LoadedModel, LoadOptions, Turn, open_checkpoint
from llava.pruning import Method
from llava.serving import Piece, Report, Request

IMAGES = sorted((Path(__file__).parent.parent / "llava" / "assets" / "images").glob("*.png"))
QUESTIONS = [
    "What shape is in the image?",
    "Is there a red shape?",
    "What color is the shape in the image, and how many corners does it have?",
    "Does it contain a circle?",
    "Describe the picture.",
]
CONFIGS = [
    None,
    "shipped",
    {"method": "fastv", "layer": 2, "keep": 0.5},
    {"method": "random", "layer": 1, "keep": 0.3},
    {"method": "pyramiddrop", "layers": [3, 6, 9], "keep": [0.5, 0.25, 0.125]},
    {"method": "vtw", "layer": 6},
    {"method": "visionzip", "dominant": 20, "contextual": 5},
    {"method": "divprune", "keep": 0.2},
    {"method": "schedule", "shallow_mid_layer": 2, "select_layer": 4, "keep": 9, "exit_layer": 8},
    {"method": "shortv", "frozen_layers": [5, 6, 7]},
]


@cache
def shipped() -> LoadedModel:
    """The model that ships, float32 on the CPU; shared by all tests of a process."""
    return LoadedModel(open_checkpoint(SHIPPED_MODEL_PATH), LoadOptions(device="cpu"))


@cache
def picture(number: int):
    return shipped().checkpoint.read_picture(IMAGES[number % len(IMAGES)])


def config_of(given) -> Method | None:
    if given is None:
        return None
    return shipped().checkpoint.pruning_config(None if given == "shipped" else given)


def random_request(source: random.Random, longest: int = 12, config="any", **how) -> Request:
    """A prompt of one to three turns with no, one or two pictures, and a config of any kind."""
    turns = []
    for number in range(source.choice([1, 1, 2])):
        pictures = [picture(source.randrange(len(IMAGES))) for _ in range(source.choice([0, 1, 1, 1, 2]))]
        turns.append(Turn(source.choice(QUESTIONS), pictures, said="a red circle" if number == 0 else None))
    turns[-1].said = None
    return Request(
        shipped().checkpoint.encode(turns),
        config_of(source.choice(CONFIGS) if config == "any" else config),
        GenerationOptions(max_new_tokens=source.randint(1, longest)),
        **how,
    )


def alone(request: Request) -> Answer:
    """The answer to a request by itself."""
    return shipped().answer(request.prompt, request.config, request.options)


def read(events) -> tuple[list[tuple[int, ...]], list[str], Report]:
    """Tokens and texts of all answers to one request, and the report."""
    ids: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    for event in events:
        if isinstance(event, Piece):
            ids.setdefault(event.index, []).append(event.token)
            texts[event.index] = texts.get(event.index, "") + event.text
    assert isinstance(event, Report)
    return [tuple(ids[index]) for index in sorted(ids)], [texts[index] for index in sorted(texts)], event
