"""Reading and naming the small files of an evaluation; `llava.utils.write_whole` writes them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.utils import UserError
from llava.utils import to_json as to_json


def iter_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield ``(number, text)`` of the non-blank lines, counted from 1; only ``\\n`` ends a line."""
    try:
        # str.splitlines would also split at U+2028 and friends, which JSON leaves unescaped inside strings.
        with open(path, encoding="utf-8-sig", newline="\n") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read one JSON object a line. Raises ``UserError`` naming the file and the number of a broken line."""
    records = []
    for number, line in iter_lines(Path(path)):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error}); correct or remove it") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: a JSON object was expected, not {type(record).__name__}")
        records.append(record)
    return records


def read_json(path: str | Path) -> Any:
    """Read one JSON document. Raises ``UserError`` naming the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """Read an answers file (formats: ``question_id``, ``prompt``, ``text`` …), checking what scorers need."""
    answers = read_jsonl(path)
    if not answers:
        raise UserError(f"{path} holds no answers")
    for number, answer in enumerate(answers, start=1):
        for key in ("question_id", "prompt", "text"):
            if key not in answer:
                raise UserError(f'{path}, answer {number}: "{key}" is missing')
        if not isinstance(answer["question_id"], str | int):
            raise UserError(f'{path}, answer {number}: "question_id" must be a string or a number')
        if not isinstance(answer["text"], str) or not isinstance(answer["prompt"], str):
            raise UserError(f'{path}, answer {number}: "text" and "prompt" must be strings')
    return answers


def to_jsonl(records: Sequence[Mapping[str, Any]]) -> str:
    """One JSON object a line, each line ended."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def move_aside(path: Path) -> Path | None:
    """Rename an existing file to ``<name>.bak-<time>`` and return the new path; nothing is overwritten."""
    if not path.exists():
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target = path.with_name(f"{path.name}.bak-{stamp}")
    counter = 1
    while target.exists():
        counter += 1
        target = path.with_name(f"{path.name}.bak-{stamp}-{counter}")
    path.rename(target)
    return target


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def inside(folder: Path, name: str) -> Path:
    """Path of ``name`` under ``folder``; absolute names and names that climb out are refused.

    The name is judged as written, so that symbolic links which the user laid inside the folder still work,
    and ``..`` is resolved in the name before any link is followed.
    """
    normal = os.path.normpath(name)
    climbs = normal == ".." or normal.startswith(".." + os.sep)
    if not name or "\0" in name or normal == "." or os.path.isabs(normal) or climbs:
        raise UserError(f"the path {name!r} leads out of {folder}; only files inside it are used")
    return folder / normal
