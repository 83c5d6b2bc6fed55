"""Write the small training data that comes with the project: ``playground/data/train``, in LLaVA's format.

Pictures are rendered, and captions and questions written, by what trained the shipped model, from seeds of their own.
Always the same bytes for the same library versions.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from tiny_llava.questions import INSTRUCTION, describe, write_questions  # noqa: E402
from tiny_llava.renderer import make_scene, render  # noqa: E402

PICTURES, QUESTIONS = 160, 4


def main() -> None:
    folder = ROOT / "playground" / "data" / "train"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    captions, questions = [], []
    for number in range(PICTURES):
        rng = random.Random(f"training data that ships {number}")
        scene = make_scene(rng)
        name = f"{number:03d}.png"
        buffer = io.BytesIO()
        render(scene).save(buffer, "PNG", optimize=True)
        (folder / "images" / name).write_bytes(buffer.getvalue())
        asked = write_questions(scene, rng, QUESTIONS)
        captions.append(entry(name, [("<image>\nDescribe the picture.", describe(scene, rng))]))
        if not asked:  # a picture of a text that nobody asks for
            continue
        turns = [(f"{question.text}\n{INSTRUCTION}", question.answer) for question in asked]
        first, answer = turns[0]
        questions.append(entry(name, [(f"<image>\n{first}", answer), *turns[1:]]))
    for file, entries in (("captions.json", captions), ("questions.json", questions)):
        lines = ",\n".join(json.dumps(each) for each in entries)
        (folder / file).write_text(f"[\n{lines}\n]\n", encoding="utf-8", newline="\n")


def entry(image: str, turns: list[tuple[str, str]]) -> dict:
    """One sample as LLaVA's files have it."""
    said = [
        {"from": who, "value": text}
        for question, answer in turns
        for who, text in (("human", question), ("gpt", answer))
    ]
    return {"id": image.removesuffix(".png"), "image": image, "conversations": said}


if __name__ == "__main__":
    main()
