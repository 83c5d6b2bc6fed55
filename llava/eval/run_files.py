"""The files of a run that nothing may be lost from: answers by line, shards of several processes, what wrote them.

Process 0 appends to ``answers.jsonl`` as it goes, process n to ``answers.jsonl.shard-<n>``; ``answers.jsonl.run.json``
says what the answers are answers to. ``answer_id`` begins with the question's line, so that any of these files, in
any order and number, says which questions are done. At the end all is merged into ``answers.jsonl``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import shortuuid
from filelock import FileLock, Timeout

from llava.eval.files import move_aside, read_json, sha256_of, to_json, to_jsonl
from llava.eval.questions import Question
from llava.utils import UserError, write_whole

Record = dict[str, Any]

# Weights are hashed whole up to this size; of larger files the fingerprint takes evenly spaced samples.
_HASHED_WHOLE = 64 << 20
_SAMPLES, _SAMPLE_SIZE = 64, 1 << 16
_MODEL_FILES = ("*.json", "*.jinja", "*.safetensors", "*.bin", "tokenizer.model")


# --- answers ---


def answer_record(question: Question, text: str, model_id: str) -> Record:
    """An answer as LLaVA writes it; ``answer_id`` is ``<line>-<random>``."""
    return {
        "question_id": question.question_id,
        "prompt": question.text,
        "text": text,
        "answer_id": f"{question.line}-{shortuuid.uuid()}",
        "model_id": model_id,
        "metadata": {},
    }


def line_of_answer(record: Mapping[str, Any]) -> int:
    """The question's line that an answer belongs to. Raises ValueError for answers of other programs."""
    match = re.fullmatch(r"(\d+)-\w+", str(record.get("answer_id")))
    if not match:
        raise ValueError(f"answer_id {record.get('answer_id')!r} does not begin with a question's line")
    return int(match[1])


def line_of_trace(record: Mapping[str, Any]) -> int:
    """The question's line that a line of a trace file belongs to."""
    if not isinstance(record.get("line"), int):
        raise ValueError("the key 'line' is missing")
    return record["line"]


class ShardedFile:
    """A jsonl file that several processes write together, each its own part.

    Args:
        path: the whole file; process 0 appends to it, process n to ``<path>.shard-<n>``.
        line_of: the question's line that a record belongs to.
    """

    def __init__(self, path: Path, line_of: Callable[[Mapping[str, Any]], int]) -> None:
        self.path, self.line_of = path, line_of

    def part(self, rank: int) -> Path:
        """The file that process ``rank`` writes."""
        return self.path if rank == 0 else self.path.with_name(f"{self.path.name}.shard-{rank}")

    def parts(self) -> list[Path]:
        """All parts that exist."""
        shards = [
            path
            for path in self.path.parent.glob("*.shard-*")
            if re.fullmatch(re.escape(self.path.name) + r"\.shard-\d+", path.name)
        ]
        return [path for path in (self.path, *sorted(shards)) if path.exists()]

    def read(self) -> dict[int, Record]:
        """Records of all parts by line. A torn last line of a part, what a killed process leaves, is passed over.

        Raises:
            UserError: a broken line elsewhere, or a record of another program.
        """
        records: dict[int, Record] = {}
        for path in self.parts():
            for number, record in enumerate(_whole_lines(path), start=1):
                try:
                    records.setdefault(self.line_of(record), record)
                except ValueError as error:
                    raise UserError(
                        f"{path}, line {number} was not written by this program ({error}); move the file away, or let "
                        "--no-resume do it"
                    ) from error
        return records

    def open_part(self, rank: int) -> PartWriter:
        """Open the part of process ``rank`` for appending."""
        return PartWriter(self.part(rank))

    def merge(self) -> int:
        """Make one file of all parts, in the order of lines; return how many records it holds."""
        records = self.read()
        shards = [path for path in self.parts() if path != self.path]
        write_whole(self.path, to_jsonl([records[line] for line in sorted(records)]))
        for shard in shards:
            shard.unlink()
            _lock_file(shard).unlink(missing_ok=True)  # of a run that was killed
        return len(records)

    def move_aside(self) -> list[Path]:
        """Rename all parts to ``*.bak-<time>``."""
        return [moved for part in self.parts() if (moved := move_aside(part)) is not None]


def _whole_lines(path: Path) -> list[Record]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    *lines, _torn = content.split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines) and _torn == b"":
                break
            raise UserError(
                f"{path}, line {number} is broken ({error}); remove that line and start again, its question will be "
                "asked again"
            ) from error
        records.append(record)
    return records


class PartWriter:
    """Appends whole lines to one part and forces each batch to disk. One process at a time: a lock says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The system's lock goes with the process: the file that a killed run leaves behind blocks nobody.
            self._lock = FileLock(_lock_file(path))
            self._lock.acquire(blocking=False)
            self._stream: BinaryIO = open(path, "ab+", buffering=0)  # noqa: SIM115
            self._drop_torn_line()
        except Timeout as error:
            raise UserError(f"another run is writing {path}; wait for it or end it") from error
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error

    def _drop_torn_line(self) -> None:
        self._stream.seek(0)
        content = self._stream.read()
        whole = content.rfind(b"\n") + 1
        last = content[content.rfind(b"\n", 0, max(0, whole - 1)) + 1 : whole]
        try:
            json.loads(last or b"0")
        except ValueError:
            whole -= len(last)
        if whole < len(content):
            self._stream.truncate(whole)

    def append(self, records: Iterable[Record]) -> None:
        """Write records and wait until they are on disk.

        Raises:
            UserError: the disk is full or gone; what was written before stays whole.
        """
        content = memoryview(to_jsonl(list(records)).encode())
        size = os.fstat(self._stream.fileno()).st_size
        try:
            while content:
                content = content[self._stream.write(content) or 0 :]
            os.fsync(self._stream.fileno())
        except OSError as error:
            self._stream.truncate(size)
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}. The answers before this batch are safe; make "
                "room and start again to go on"
            ) from error

    def close(self) -> None:
        """Close the file and give the lock back."""
        self._stream.close()
        with suppress(OSError):  # where open files cannot be removed
            _lock_file(self.path).unlink()
        self._lock.release()


def _lock_file(part: Path) -> Path:
    return part.with_name(f".{part.name}.lock")


# --- what the answers are answers to ---


def model_fingerprint(folder: Path) -> str:
    """A hash over a model folder's files: names, sizes, and contents (of large files: samples)."""
    digest = hashlib.sha256()
    files = {path for pattern in _MODEL_FILES for path in folder.glob(pattern)}
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        if size <= _HASHED_WHOLE:
            digest.update(sha256_of(path).encode())
            continue
        with open(path, "rb") as stream:
            for index in range(_SAMPLES):
                stream.seek(index * (size - _SAMPLE_SIZE) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_SIZE))
    return digest.hexdigest()


def run_file_of(answers_file: Path) -> Path:
    """The file beside the answers that says what wrote them."""
    return answers_file.with_name(answers_file.name + ".run.json")


def check_identity(path: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a run that ``path`` describes is there to go on with.

    Raises:
        UserError: it is there, but of another model, config, question file …; every difference is named.
    """
    if not path.exists():
        return False
    written = read_json(path)
    if not isinstance(written, dict):
        raise UserError(f"{path} does not describe a run; move it and the answers away, or use --no-resume")
    differences = [
        f"{key}: {_short(written.get(key))} there, {_short(identity[key])} now"
        for key in identity
        if written.get(key) != identity[key]
    ]
    if differences:
        raise UserError(
            f"the answers beside {path.name} come from another run ({'; '.join(differences)}). Give another "
            "--answers-file, or --no-resume to move them aside and begin anew"
        )
    return True


def write_identity(path: Path, identity: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Record what the answers are answers to; ``about`` is for people and never compared."""
    write_whole(path, to_json({**identity, "about": dict(about)}))


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    return json.dumps(value, ensure_ascii=False)


def check_answers(records: Mapping[int, Record], questions: Sequence[Question], path: Path) -> None:
    """Raise ``UserError`` if an answer does not fit the question of its line."""
    for line, record in records.items():
        fits = line < len(questions) and (
            (record.get("question_id"), record.get("prompt")) == (questions[line].question_id, questions[line].text)
        )
        if not fits:
            raise UserError(
                f"{path} holds an answer to line {line + 1} that does not fit the question there; begin anew with "
                "--no-resume"
            )
