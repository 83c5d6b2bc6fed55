"""What a calibration looks at: pictures, and a question about each. No labels are read."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.files import inside, read_json, read_jsonl, sha256_of
from llava.utils import UserError

BUILT_IN = (
    "What is in this picture?",
    "What is the main thing in this picture, and what colour is it?",
    "How many things can you see? Answer with a number.",
    "Is there any text in this picture? If there is, what does it say?",
    "What is on the left and what is on the right?",
    "Describe this picture in one sentence.",
)
"""Asked in turn about pictures that come without questions, two of each."""
_EACH = 2


@dataclass(frozen=True)
class Sample:
    """One question about one or several pictures.

    Attributes:
        group: one of its pictures, the same for all samples that share pictures, directly or through others. A split
            or a resampling never tells them apart.
    """

    pictures: tuple[Path, ...]
    question: str
    group: Path


def read_samples(images: Path, questions: Path | None, seed: int, pictures: int) -> list[Sample]:
    """Questions about at most `pictures` (groups of) pictures, drawn with `seed`.

    Args:
        images: the folder that all pictures lie in.
        questions: LLaVA's JSON (`[{"image": …, "conversations": […]}]`, of which the first question is asked) or
            one JSON object a line (`{"image", "text"}`); None: the pictures of the folder, with questions of our own.

    Raises:
        UserError: nothing to ask about, a broken file, or a picture outside the folder.
    """
    if not images.is_dir():
        raise UserError(f"--images {images}: there is no such folder")
    samples = _grouped(_listed(images, questions) if questions is not None else _found(images))
    groups = sorted({sample.group for sample in samples})
    if len(groups) < 2:
        raise UserError(
            f"{questions or images} has {len(groups)} pictures with a question (those asked about together count as "
            "one); at least 2 are needed, one half to choose on and one to report on"
        )
    random.Random(seed).shuffle(groups)
    chosen = {group: place for place, group in enumerate(groups[:pictures])}
    return sorted((one for one in samples if one.group in chosen), key=lambda one: chosen[one.group])


def halves(samples: Sequence[Sample]) -> tuple[list[int], list[int]]:
    """Indices to choose on, and to report on: no picture is in both."""
    groups = list(dict.fromkeys(sample.group for sample in samples))
    first = set(groups[: (len(groups) + 1) // 2])
    chosen = [number for number, sample in enumerate(samples) if sample.group in first]
    return chosen, [number for number, sample in enumerate(samples) if sample.group not in first]


def hash_of(samples: Sequence[Sample]) -> str:
    """SHA-256 over all questions and the bytes of their pictures, in order."""
    digest = hashlib.sha256()
    files: dict[Path, str] = {}
    for sample in samples:
        digest.update(json.dumps(sample.question).encode())
        for path in sample.pictures:
            if path not in files:
                files[path] = sha256_of(path)
            digest.update(files[path].encode())
    return digest.hexdigest()


def _grouped(asked: Sequence[tuple[tuple[Path, ...], str]]) -> list[Sample]:
    parents: dict[Path, Path] = {}

    def first(picture: Path) -> Path:
        while (parent := parents.setdefault(picture, picture)) != picture:
            parents[picture] = parents[parent]
            picture = parent
        return picture

    for pictures, _ in asked:
        for picture in pictures:
            parents[first(picture)] = first(pictures[0])
    return [Sample(pictures, question, first(pictures[0])) for pictures, question in asked]


def _found(folder: Path) -> list[tuple[tuple[Path, ...], str]]:
    known = Image.registered_extensions()
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in known)
    if not files:
        raise UserError(f"--images {folder}: there is no picture in this folder")
    asked = [(path, _EACH * number + turn) for number, path in enumerate(files) for turn in range(_EACH)]
    return [((path,), BUILT_IN[number % len(BUILT_IN)]) for path, number in asked]


def _listed(folder: Path, file: Path) -> list[tuple[tuple[Path, ...], str]]:
    records = read_jsonl(file) if file.suffix == ".jsonl" else read_json(file)
    if not isinstance(records, list):
        raise UserError(f"{file}: a list of questions is needed (LLaVA's JSON), or one JSON object a line (.jsonl)")
    asked = []
    for number, record in enumerate(records, start=1):
        names, question = _parts(record, f"{file}, entry {number}")
        if names and question:
            asked.append((tuple(inside(folder, name) for name in names), question))
    return asked


def _parts(record: Any, place: str) -> tuple[list[str], str]:
    """Picture names and question of one entry; none of either where it has no picture."""
    image = record.get("image") if isinstance(record, dict) else None
    names = image if isinstance(image, list) else [] if image is None else [image]
    turns = record.get("conversations") if isinstance(record, dict) else None
    text = record.get("text") if isinstance(record, dict) else None
    if isinstance(turns, list):
        said = (turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == "human")
        text = next(said, None)
    if not all(isinstance(name, str) for name in names) or not isinstance(text, str):
        raise UserError(f'{place}: "image" (file names) and "text" or "conversations" are needed, not {record!r}')
    return names, text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
