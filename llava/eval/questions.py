"""Question files: one JSON object a line, ``{"question_id", "image", "text", "category"}``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava.eval.files import inside, read_jsonl
from llava.utils import UserError


@dataclass(frozen=True)
class Question:
    """One line of a question file.

    Attributes:
        line: its index among the file's questions, from 0. Ids may repeat; this tells questions apart.
        question_id: the benchmark's own id.
        text: what is asked.
        image: the picture's file; None for a question without one.
    """

    line: int
    question_id: str | int
    text: str
    image: Path | None


def read_questions(path: str | Path, image_folder: str | Path) -> list[Question]:
    """Read and check a question file.

    Raises:
        UserError: no questions, a broken line, a missing key, or an image path that leaves ``image_folder``;
            the message names the file and the question.
    """
    folder = Path(image_folder)
    questions = []
    for line, record in enumerate(read_jsonl(path)):
        place = f"{path}, question {line + 1}"
        question_id, text, image = record.get("question_id"), record.get("text"), record.get("image")
        if isinstance(question_id, bool) or not isinstance(question_id, str | int):
            raise UserError(f'{place}: "question_id" must be a string or a number, not {question_id!r}')
        if not isinstance(text, str):
            raise UserError(f'{place}: "text" must be a string, not {text!r}')
        if image is not None and not isinstance(image, str):
            raise UserError(f'{place}: "image" must be a file name, not {image!r}')
        try:
            file = None if image is None else inside(folder, image)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        questions.append(Question(line, question_id, text, file))
    if not questions:
        raise UserError(f"{path} holds no questions")
    files = [question.image for question in questions if question.image]
    if files and not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist")
    if files and not any(file.is_file() for file in files):
        raise UserError(f"none of the images of {path} is in {folder} (the first would be {files[0]})")
    return questions


def chunk(questions: list[Question], num_chunks: int, chunk_idx: int) -> list[Question]:
    """Part ``chunk_idx`` of ``num_chunks``, each of ceil(questions / chunks); past the end it is empty."""
    if num_chunks < 1 or not 0 <= chunk_idx < num_chunks:
        raise UserError(f"--chunk-idx {chunk_idx} of --num-chunks {num_chunks}: 0 <= index < number is needed")
    size = -(-len(questions) // num_chunks)
    return questions[chunk_idx * size : (chunk_idx + 1) * size]
