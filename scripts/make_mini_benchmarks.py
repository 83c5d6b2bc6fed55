#!/usr/bin/env python
"""Make the small benchmarks that come with the project, in the layouts of GQA, MME, TextVQA and POPE.

``python scripts/make_mini_benchmarks.py`` writes ``playground/data/mini`` anew, always the same bytes for the same
seed and library versions. Pictures are rendered from seeds that training never draws, and taken from easy-VQA's real
test split (PyPI package ``easy-vqa``, MIT). Questions and answers come from the shipped model's question writer.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from tiny_llava.easyvqa import easy_by_image, easy_picture  # noqa: E402
from tiny_llava.questions import (  # noqa: E402
    INSTRUCTION,
    MME_CATEGORIES,
    POPE_CATEGORIES,
    gqa_pictures,
    mme_pictures,
    pope_pictures,
    textvqa_pictures,
)
from tiny_llava.renderer import COLORS, render  # noqa: E402

from llava.eval.files import to_jsonl  # noqa: E402

GQA_RENDERED, GQA_EASY = 90, 40
MME_PICTURES = 30  # a category
TEXTVQA_PICTURES = 250
POPE_PICTURES = 20  # six questions each, in each category
EASY_STRIDE = 16  # takes pictures from all over the test split


def save(picture: Image.Image, path: Path) -> None:
    """The picture as a small PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    path.write_bytes(buffer.getvalue())


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def asked(question: str) -> str:
    """A question as LLaVA's files put it."""
    return f"{question}\n{INSTRUCTION}"


def line(question_id: str | int, image: str, text: str, category: str = "default") -> dict[str, Any]:
    return {"question_id": question_id, "image": image, "text": text, "category": category}


# --- GQA ---


def make_gqa(folder: Path, seed: int) -> None:
    """Attributes, positions, relations and existence on rendered pictures; easy-VQA's own questions on its own."""
    truth: dict[str, Any] = {}
    lines = []

    def add(image: str, question: str, answer: str, structural: str, semantic: str, detailed: str) -> None:
        question_id = f"{len(truth):06d}"
        types = {"structural": structural, "semantic": semantic, "detailed": detailed}
        truth[question_id] = {
            "question": question,
            "answer": answer,
            "imageId": Path(image).stem,
            "isBalanced": True,
            "types": types,
        }
        lines.append(line(question_id, image, asked(question)))

    for index, (scene, questions) in enumerate(gqa_pictures(GQA_RENDERED, seed)):
        image = f"r{index:03d}.png"
        save(render(scene), folder / "data" / "images" / image)
        for question in questions:
            add(image, question.text, question.answer, question.structural, question.semantic, question.task)
    for number, pairs in easy_by_image("test")[::EASY_STRIDE][:GQA_EASY]:
        image = f"easy{number:04d}.png"
        save(easy_picture("test", number), folder / "data" / "images" / image)
        # One question for each different answer, the first of it.
        chosen = {answer: text for text, answer in reversed(pairs)}
        for answer, text in chosen.items():
            is_open = answer not in ("yes", "no")
            semantic = "attr" if any(color in (answer, *text.split()) for color in COLORS) else "obj"
            question = text[0].upper() + text[1:]
            add(image, question, answer, "query" if is_open else "verify", semantic, "easyVQA")
    write(folder / "llava_gqa_testdev_balanced.jsonl", to_jsonl(lines))
    write(folder / "data" / "testdev_balanced_questions.json", json.dumps(truth, indent=1) + "\n")


# --- MME ---


def make_mme(folder: Path, seed: int) -> None:
    """Two questions a picture, one yes and one no; ``existence`` and ``OCR`` in MME's two annotation layouts."""
    release = folder / "MME_Benchmark_release_version"
    lines = []
    for category in MME_CATEGORIES:
        in_subfolders = category == "existence"
        for index, (scene, yes, no) in enumerate(mme_pictures(category, MME_PICTURES, seed)):
            image = f"{category}/images/{index:04d}.png" if in_subfolders else f"{category}/{index:04d}.png"
            save(render(scene), release / image)
            notes = release / category / ("questions_answers_YN" if in_subfolders else "") / f"{index:04d}.txt"
            write(notes, f"{yes.text}\tYes\n{no.text}\tNo\n")
            lines += [line(image, image, asked(question.text), category) for question in (yes, no)]
    write(folder / "llava_mme.jsonl", to_jsonl(lines))


# --- TextVQA ---


def make_textvqa(folder: Path, seed: int) -> None:
    """What a text says, with a line of OCR tokens, some of them wrong; ten people's answers."""
    lines, data = [], []
    for index, (scene, question, tokens, answers) in enumerate(textvqa_pictures(TEXTVQA_PICTURES, seed)):
        image_id = f"t{index:04d}"
        save(render(scene), folder / "train_images" / f"{image_id}.png")
        text = asked(f"{question.text}\nReference OCR token: {', '.join(tokens)}")
        lines.append(line(image_id, f"{image_id}.png", text))
        data.append({"image_id": image_id, "question_id": index, "question": question.text, "answers": answers})
    write(folder / "llava_textvqa_val_v051_ocr.jsonl", to_jsonl(lines))
    truth = {"dataset_type": "val", "dataset_name": "textvqa-mini", "dataset_version": "0.5.1", "data": data}
    write(folder / "TextVQA_0.5.1_val.json", json.dumps(truth) + "\n")


# --- POPE ---


def make_pope(folder: Path, seed: int) -> None:
    """Is it there? Three things that are and three that are not a picture, in three categories."""
    lines = []
    for category in POPE_CATEGORIES:
        labels = []
        for index, (scene, questions) in enumerate(pope_pictures(category, POPE_PICTURES, seed)):
            image = f"{category}_{index:03d}.png"
            save(render(scene), folder / "val2014" / image)
            for question in questions:
                lines.append(line(len(lines), image, asked(question.text), category))
                label = {"question_id": len(labels) + 1, "image": image, "text": question.text}
                labels.append({**label, "label": question.answer})
        write(folder / "coco" / f"coco_pope_{category}.json", to_jsonl(labels))
    write(folder / "llava_pope_test.jsonl", to_jsonl(lines))


def size_of(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "playground" / "data" / "mini", metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    makers = {"gqa": make_gqa, "MME": make_mme, "textvqa": make_textvqa, "pope": make_pope}
    for name, make in makers.items():
        folder = args.out / name
        if folder.exists():
            shutil.rmtree(folder)
        make(folder, args.seed)
        questions = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("*.jsonl"))
        print(f"{name}: {questions} questions, {size_of(folder.rglob('*')) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
