"""POPE: does the model see objects that are not there? Accuracy, precision, recall, F1, yes-ratio a category.

``python -m llava.eval.eval_pope --annotation-dir pope/coco --question-file llava_pope_test.jsonl
--result-file answers.jsonl``
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.files import read_answers, read_jsonl
from llava.eval.scoring import Scores, check_complete, mean, publish, score_parser, show
from llava.eval.verdicts import Sums, Verdicts
from llava.utils import UserError, run_main

_PREFIX, _SUFFIX = "coco_pope_", ".json"


def says_yes(text: str) -> bool:
    """POPE's reading of an answer: its first sentence, split at spaces, says no if it holds No, not or no."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"}.intersection(words)


def binary_metrics(predicted: Sequence[bool], labels: Sequence[bool]) -> dict[str, float | int]:
    """Accuracy, precision, recall, F1 and yes-ratio as percentages (0 where a denominator is 0), and ``n``."""
    if len(predicted) != len(labels) or not labels:
        raise UserError(f"{len(predicted)} answers cannot be compared with {len(labels)} labels")
    hits = sum(p == t for p, t in zip(predicted, labels, strict=True))
    true_yes = sum(p and t for p, t in zip(predicted, labels, strict=True))
    said_yes, are_yes = sum(predicted), sum(labels)
    precision = true_yes / said_yes if said_yes else 0.0
    recall = true_yes / are_yes if are_yes else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    n = len(labels)
    percentages = {
        "accuracy": hits / n,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": said_yes / n,
    }
    return {key: 100 * value for key, value in percentages.items()} | {"n": n}


def score_pope(
    answers: Sequence[Mapping[str, Any]],
    questions: Sequence[Mapping[str, Any]],
    labels: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    allow_partial: bool = False,
) -> Scores:
    """Score answers by category. ``labels`` maps each category to the entries of its label file.

    A category's answers meet its labels in order; ids do not take part. ``score`` is the mean F1 over the
    categories, the figure that LLaVA reports.

    Raises:
        UserError: answers and labels of a category differ in number (with ``allow_partial`` the missing ones
            are left out), or an answer belongs to no question.
    """
    judged = judge_pope(answers, questions, labels)
    asked = {place for place, *_ in judged}
    missing = [question["question_id"] for place, question in enumerate(questions) if place not in asked]
    answered = check_complete(missing, len(questions), allow_partial)
    categories = {}
    for category in labels:
        own = [(says, label) for _, of, says, label in judged if of == category]
        if own:
            categories[category] = binary_metrics([says for says, _ in own], [label for _, label in own])
    return {
        "benchmark": "pope",
        "score": mean(values["f1"] for values in categories.values()),
        "answered": answered,
        "total": len(questions),
        "accuracy": mean(values["accuracy"] for values in categories.values()),
        "f1": mean(values["f1"] for values in categories.values()),
        "categories": categories,
    }


def judge_pope(
    answers: Sequence[Mapping[str, Any]],
    questions: Sequence[Mapping[str, Any]],
    labels: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[tuple[int, str, bool, bool]]:
    """Of each answer: the place of its question, its category, whether it says yes, and whether that is the label.

    Raises:
        UserError: as `score_pope`, but for answers that are missing.
    """
    if not labels:
        raise UserError("there are no POPE label files")
    slots: dict[str, int] = defaultdict(int)
    places = []  # (category, index among the category's questions) of every question, in order
    for question in questions:
        category = str(question.get("category"))
        if category not in labels:
            raise UserError(f"question {question['question_id']!r}: no label file for category {category!r}")
        places.append((category, slots[category]))
        slots[category] += 1
    for category, entries in labels.items():
        if slots[category] != len(entries):
            raise UserError(
                f"category {category!r} has {slots[category]} questions and {len(entries)} labels; they go together in "
                "order, so their numbers must be equal"
            )

    judged = []
    for answer, place in zip(answers, _places_of(answers, questions), strict=True):
        category, index = places[place]
        judged.append((place, category, says_yes(answer["text"]), _label(labels[category][index], category)))
    return judged


def verdicts_of(judged: Sequence[tuple[int, str, bool, bool]]) -> Verdicts:
    """Verdicts from `judge_pope`; the score is the mean F1 of the categories."""
    places, categories, said, labels = (np.array(column) for column in zip(*judged, strict=True))
    parts = np.stack([said & labels, said, labels], axis=1).astype(np.float64)
    return Verdicts((said == labels).astype(np.float64), categories, places, parts, _mean_f1)


def _mean_f1(sums: Sums) -> np.ndarray:
    # 2PR / (P + R) with P = hits / said and R = hits / labels; 0 where nothing is right.
    counts = np.stack(list(sums.values()))  # [categories, draws, 3]
    hits, said, labels = np.moveaxis(counts, -1, 0)
    return (100 * 2 * hits / np.maximum(said + labels, 1)).mean(0)


def _places_of(answers: Sequence[Mapping[str, Any]], questions: Sequence[Mapping[str, Any]]) -> list[int]:
    """Index of the question whose label each answer meets.

    A complete file meets the labels by its order within each category, whatever order that is (the published
    rule). A partial one must keep the question file's order, so that its gaps can be found.
    """
    asked = [question["question_id"] for question in questions]
    given = [answer["question_id"] for answer in answers]
    if given == asked:
        return list(range(len(questions)))
    if Counter(given) == Counter(asked):
        waiting: dict[Any, deque[int]] = defaultdict(deque)
        category_of: dict[Any, Any] = {}
        for index, question in enumerate(questions):
            waiting[question["category"]].append(index)
            if category_of.setdefault(question["question_id"], question["category"]) != question["category"]:
                raise UserError(
                    f"question id {question['question_id']!r} stands in two categories and the answers are not in the "
                    "question file's order: which is whose cannot be told"
                )
        return [waiting[category_of[question_id]].popleft() for question_id in given]
    order = []
    place = 0
    for number, answer in enumerate(answers, start=1):
        while place < len(questions) and not _same(answer, questions[place]):
            place += 1
        if place == len(questions):
            raise UserError(
                f"answer {number} ({answer['question_id']!r}) is not, or not in this order, in the question file; "
                "POPE's labels go by order"
            )
        order.append(place)
        place += 1
    return order


def _same(answer: Mapping[str, Any], question: Mapping[str, Any]) -> bool:
    return answer["question_id"] == question["question_id"] and answer["prompt"] == question["text"]


def _label(entry: Mapping[str, Any], category: str) -> bool:
    # The published script takes everything but "no" as yes; a third word in a label file is a broken file.
    if entry.get("label") not in ("yes", "no"):
        raise UserError(f"a label of category {category!r} is {entry.get('label')!r}; yes or no was expected")
    return entry["label"] == "yes"


def read_labels(folder: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Read every ``coco_pope_<category>.json`` (JSON lines) of a folder."""
    files = sorted(Path(folder).glob(f"{_PREFIX}*{_SUFFIX}"))
    if not files:
        raise UserError(f"no {_PREFIX}<category>{_SUFFIX} in {folder}")
    return {file.name[len(_PREFIX) : -len(_SUFFIX)]: read_jsonl(file) for file in files}


def score_files(
    annotation_dir: str | Path, question_file: str | Path, result_file: str | Path, *, allow_partial: bool = False
) -> Scores:
    """:func:`score_pope` on files."""
    return score_pope(
        read_answers(result_file),
        read_jsonl(question_file),
        read_labels(annotation_dir),
        allow_partial=allow_partial,
    )


def judge_files(annotation_dir: str | Path, question_file: str | Path, result_file: str | Path) -> Verdicts:
    """Verdicts on the answers, in their order."""
    return verdicts_of(judge_pope(read_answers(result_file), read_jsonl(question_file), read_labels(annotation_dir)))


def print_scores(scores: Scores) -> None:
    """The scores as a table."""
    columns = ("accuracy", "precision", "recall", "f1", "yes_ratio", "n")
    rows = [(name, *(values[key] for key in columns)) for name, values in scores["categories"].items()]
    rows.append(("mean", scores["accuracy"], None, None, scores["f1"], None, scores["answered"]))
    show(f"POPE, {scores['answered']} questions", ("category", *columns), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = score_parser("Score POPE answers.")
    parser.add_argument("--annotation-dir", required=True, metavar="DIR", help="folder of coco_pope_<category>.json")
    parser.add_argument("--question-file", required=True, metavar="FILE", help="llava_pope_test.jsonl")
    args = parser.parse_args(argv)
    scores = score_files(args.annotation_dir, args.question_file, args.result_file, allow_partial=args.allow_partial)
    publish(scores, args, print_scores)


if __name__ == "__main__":
    run_main(main)
