"""Write training data as LLaVA's: pictures, and JSON of conversations about them.

python -m scripts.smollm2.data --drawings runs/smollm2/drawings --out runs/smollm2/data --pictures 4000

``pretrain.json`` has a caption a picture, ``finetune.json`` conversations of about nine turns, and between them plain
questions without a picture (``plain.json``, if it is there: `plain.py` writes it).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from llava.constants import ANSWER_INSTRUCTION, DEFAULT_IMAGE_TOKEN

from .drawings import SEEN, Drawings
from .questions import Question, conversation, description
from .scenes import make_scene, render

FIRST = 5_000_000
"""Number of the first scene: none that the tower was trained on."""


def turns_of(short: bool, questions: list[Question]) -> list[dict[str, str]]:
    """LLaVA's ``conversations``; how to answer is said once, in the first turn."""
    turns = []
    for number, question in enumerate(questions):
        text = question.text
        if number == 0:
            text = f"{DEFAULT_IMAGE_TOKEN}\n{text}" + (f"\n{ANSWER_INSTRUCTION}" if short else "")
        turns.append({"from": "human", "value": text})
        turns.append({"from": "gpt", "value": question.short if short else question.sentence})
    return turns


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", type=Path, default=Path("runs/smollm2/drawings"))
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2/data"))
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--captions", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    drawings, images = Drawings(args.drawings, SEEN), args.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    captions: list[dict[str, Any]] = []
    chats: list[dict[str, Any]] = []
    for number in range(args.pictures + args.captions):
        scene = make_scene(FIRST + args.seed * 1_000_000 + number)
        name = f"{number:06}.png"
        if not (images / name).is_file():
            render(scene, drawings)[0].save(images / name)
        if number < args.captions:
            asked = [{"from": "human", "value": DEFAULT_IMAGE_TOKEN}, {"from": "gpt", "value": description(scene)}]
            captions.append({"id": name[:-4], "image": name, "conversations": asked})
        else:
            turns = turns_of(*conversation(scene, random.Random(f"questions {scene.seed}")))
            chats.append({"id": name[:-4], "image": name, "conversations": turns})
    plain = args.out / "plain.json"
    if plain.is_file():
        chats += json.loads(plain.read_text(encoding="utf-8"))
    random.Random(args.seed).shuffle(chats)
    for name, samples in (("pretrain.json", captions), ("finetune.json", chats)):
        (args.out / name).write_text(json.dumps(samples, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
