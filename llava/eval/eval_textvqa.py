"""TextVQA accuracy: answers normalised as M4C does, then soft accuracy against ten people's answers.

``python -m llava.eval.eval_textvqa --annotation-file TextVQA_0.5.1_val.json --result-file answers.jsonl``
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from llava.eval.files import read_answers, read_json
from llava.eval.scoring import Scores, check_complete, mean, publish, score_parser, show
from llava.eval.verdicts import Verdicts
from llava.utils import UserError, run_main

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = {"a", "an", "the"}
# The published rule is compiled with its flag in the place of a count, so it deletes 32 full stops and no more.
_STOPS_DELETED = 32
_HUMAN_ANSWERS = 10
_OCR_MARKER = "Reference OCR token: "


@cache
def contractions() -> dict[str, str]:
    """Contractions written without their apostrophe, and the right spelling."""
    return json.loads((resources.files("llava.eval") / "vqa_contractions.json").read_text(encoding="utf-8"))


def normalize(answer: str) -> str:
    """Normalise an answer as the M4C evaluator does, steps in the published order."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    text = _strip_punctuation(text)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(contractions().get(word, word) for word in words if word not in _ARTICLES)


def _strip_punctuation(text: str) -> str:
    out = text
    for mark in _PUNCTUATION:
        at_word_edge = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if at_word_edge else " ")
    return re.sub(r"\.(?!\d)", "", out, count=_STOPS_DELETED)


def soft_scores(human_answers: Sequence[str]) -> dict[str, float]:
    """Score of each distinct normalised answer: min(1, matches / 3), averaged over the leave-one-out sets."""
    if len(human_answers) != _HUMAN_ANSWERS:
        raise UserError(f"{_HUMAN_ANSWERS} human answers were expected, not {len(human_answers)}")
    # k equal answers: k of the ten sets hold k − 1 of them, the others k.
    return {
        answer: (k * min(3, k - 1) + (_HUMAN_ANSWERS - k) * min(3, k)) / (3 * _HUMAN_ANSWERS)
        for answer, k in Counter(map(normalize, human_answers)).items()
    }


def question_of(prompt: str) -> str:
    """The question inside a prompt, lower-cased. Raises ``UserError`` naming a prompt of no known kind."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        match = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if match:
            return match.group(1).lower()
    elif _OCR_MARKER in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(_OCR_MARKER.rstrip()) else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise UserError(f"cannot find the question in the TextVQA prompt {prompt!r}")


def has_ocr_tokens(prompt: str) -> bool:
    """Whether the prompt is of the kind that brings OCR tokens (the list may be empty)."""
    return prompt.startswith("OCR tokens: ") or _OCR_MARKER in prompt


def judge_textvqa(
    answers: Iterable[Mapping[str, Any]], annotated: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[tuple[tuple[str, str], float]]:
    """The key of each answer's question in `annotated`, and its soft accuracy, 0 … 1.

    Raises:
        UserError: an answer's image and question are not annotated.
    """
    judged = []
    for answer in answers:
        key = (answer["question_id"], question_of(answer["prompt"]))
        if key not in annotated:
            raise UserError(f"the annotations have no question {key[1]!r} about image {key[0]!r}")
        judged.append((key, soft_scores(annotated[key]["answers"]).get(normalize(answer["text"]), 0.0)))
    return judged


def by_question(annotations: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """TextVQA's ``data`` list by image and lower-cased question."""
    return {(entry["image_id"], entry["question"].lower()): entry for entry in annotations}


def score_textvqa(
    answers: Iterable[Mapping[str, Any]], annotations: Sequence[Mapping[str, Any]], *, allow_partial: bool = False
) -> Scores:
    """Score answers against TextVQA's ``data`` list. ``score`` is the mean soft accuracy in percent.

    Raises:
        UserError: an answer's image and question are not annotated, or an annotation has no answer
            (unless ``allow_partial``).
    """
    answers, annotated = list(answers), by_question(annotations)
    judged = judge_textvqa(answers, annotated)
    seen, values = {key for key, _ in judged}, [value for _, value in judged]
    with_ocr = sum(has_ocr_tokens(answer["prompt"]) for answer in answers)
    answered = check_complete([key for key in annotated if key not in seen], len(annotated), allow_partial)
    accuracy = mean(values)
    assert accuracy is not None
    return {
        "benchmark": "textvqa",
        "score": 100 * accuracy,
        "answered": answered,
        "total": len(annotated),
        "accuracy": 100 * accuracy,
        "prompts": {"with OCR tokens": with_ocr, "without OCR tokens": len(values) - with_ocr},
    }


def read_annotations(path: str | Path) -> list[dict[str, Any]]:
    """TextVQA's ``data`` list."""
    annotations = read_json(path)
    if not isinstance(annotations, dict) or not isinstance(annotations.get("data"), list):
        raise UserError(f'{path}: an object with a "data" list was expected')
    return annotations["data"]


def score_files(annotation_file: str | Path, result_file: str | Path, *, allow_partial: bool = False) -> Scores:
    """:func:`score_textvqa` on files."""
    return score_textvqa(read_answers(result_file), read_annotations(annotation_file), allow_partial=allow_partial)


def judge_files(annotation_file: str | Path, result_file: str | Path) -> Verdicts:
    """Verdicts on the answers, in their order."""
    judged = judge_textvqa(read_answers(result_file), by_question(read_annotations(annotation_file)))
    return Verdicts.of_mean([value for _, value in judged])


def print_scores(scores: Scores) -> None:
    """The scores as a table."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in scores["prompts"].items() if count)
    print(f"Prompts: {kinds}")
    show(f"TextVQA, {scores['answered']} questions", ("", "%"), [("accuracy", scores["accuracy"])])


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = score_parser("Score TextVQA answers.")
    parser.add_argument("--annotation-file", required=True, metavar="FILE", help="TextVQA_0.5.1_val.json")
    args = parser.parse_args(argv)
    scores = score_files(args.annotation_file, args.result_file, allow_partial=args.allow_partial)
    publish(scores, args, print_scores)


if __name__ == "__main__":
    run_main(main)
