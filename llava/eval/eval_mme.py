"""MME: two yes/no questions a picture; accuracy, and accuracy+ where both must be right.

``python -m llava.eval.eval_mme --annotation-dir MME_Benchmark_release_version --result-file answers.jsonl``
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.constants import ANSWER_INSTRUCTION
from llava.eval.files import iter_lines, read_answers
from llava.eval.scoring import Scores, check_complete, mean, publish, score_parser, show
from llava.eval.verdicts import Sums, Verdicts
from llava.utils import UserError, run_main, write_whole

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_YES_NO = " Please answer yes or no."

#: (category, annotation file name, question) → "Yes" or "No" as the file has it
Truth = dict[tuple[str, str, str], str]


@dataclass(frozen=True)
class Judged:
    """One answer beside its truth: a line of MME's own result files."""

    question_id: str
    category: str
    file: str
    prompt: str
    truth: str
    answer: str

    @property
    def right(self) -> bool:
        return parse_answer(self.answer) == self.truth.lower()

    def line(self) -> str:
        """``file\\tprompt\\tgt\\tanswer``; what would break the line becomes a space, which scores the same."""
        return "\t".join([self.file, self.prompt, self.truth, re.sub(r"[\t\r\n]", " ", self.answer)])


def parse_answer(answer: str) -> str:
    """``yes``, ``no`` or ``other``, by MME's rule: the whole answer, else its first four characters."""
    answer = answer.lower()
    if answer in ("yes", "no"):
        return answer
    head = answer[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def category_of(question_id: str) -> str:
    """The part of an id before its first ``/``. It names files, so anything that is no plain name is refused."""
    if not isinstance(question_id, str):
        raise UserError(f"the MME question id {question_id!r} is not a path such as OCR/0001.jpg")
    category, slash, rest = question_id.partition("/")
    parts = question_id.replace("\\", "/").split("/")
    if not slash or not rest or not re.fullmatch(r"[\w .-]+", category) or "" in parts or "." in parts or ".." in parts:
        raise UserError(f"the MME question id {question_id!r} is not a path such as OCR/0001.jpg inside the benchmark")
    return category


def judge(answers: Iterable[Mapping[str, Any]], truth: Truth) -> list[Judged]:
    """Match each answer with its ground truth. Raises ``UserError`` naming a question that has none."""
    judged = []
    for answer in answers:
        question_id = answer["question_id"]
        category = category_of(question_id)
        file = question_id.rsplit("/", 1)[-1].split(".")[0] + ".txt"
        prompt = answer["prompt"].replace(ANSWER_INSTRUCTION, "").strip()
        if _YES_NO.strip() not in prompt:
            prompt += _YES_NO
        if (category, file, prompt) not in truth:
            # Some annotation files have two spaces here.
            prompt = prompt.replace(_YES_NO, " " + _YES_NO)
        if (category, file, prompt) not in truth:
            raise UserError(f"{category}/{file} has no question {answer['prompt']!r}")
        judged.append(Judged(question_id, category, file, prompt, truth[category, file, prompt], answer["text"]))
    return judged


def score_mme(judged: Sequence[Judged], truth: Truth, *, allow_partial: bool = False) -> Scores:
    """Scores per task (``acc``, ``acc_plus`` in percent, ``score`` up to 200), ``perception``, ``cognition``.

    ``score`` is Perception, the figure that LLaVA reports. The two questions of a picture stand one after the
    other; with ``allow_partial`` a picture that lacks one counts in ``acc`` only.
    """
    asked = {(item.category, item.file, item.prompt) for item in judged}
    answered = check_complete([key for key in truth if key not in asked], len(truth), allow_partial)
    tasks = {}
    for category in (*PERCEPTION, *COGNITION, *sorted({key[0] for key in truth} - {*PERCEPTION, *COGNITION})):
        items = [item for item in judged if item.category == category]
        if not items:
            continue
        pairs = _pairs(items, allow_partial)
        acc = mean(item.right for item in items)
        acc_plus = mean(first.right and second.right for first, second in pairs)
        assert acc is not None
        tasks[category] = {
            "acc": 100 * acc,
            "acc_plus": 100 * (acc_plus or 0.0),
            "score": 100 * acc + 100 * (acc_plus or 0.0),
            "questions": len(items),
            "images": len(pairs),
        }
    totals = {
        name: sum(tasks[task]["score"] for task in group if task in tasks)
        if any(task in tasks for task in group)
        else None
        for name, group in (("perception", PERCEPTION), ("cognition", COGNITION))
    }
    return {
        "benchmark": "mme",
        "score": totals["perception"],
        "answered": answered,
        "total": len(truth),
        **totals,
        "tasks": tasks,
    }


def _pairs(items: Sequence[Judged], allow_partial: bool) -> list[tuple[Judged, Judged]]:
    pairs = []
    index = 0
    while index < len(items):
        pair = items[index : index + 2]
        if len(pair) == 2 and pair[0].question_id == pair[1].question_id:
            pairs.append((pair[0], pair[1]))
            index += 2
        elif allow_partial:
            index += 1
        else:
            raise UserError(f"picture {pair[0].question_id!r} does not have two questions one after the other")
    return pairs


def verdicts_of(judged: Sequence[Judged]) -> Verdicts:
    """Verdicts in the answers' order; the score is Perception, and the questions of a picture are drawn together."""
    tasks = [[item for item in judged if item.category == category] for category in {one.category for one in judged}]
    pairs_there = [pair for items in tasks for pair in _pairs(items, allow_partial=True)]
    seen = {id(first): first.right and second.right for first, second in pairs_there}
    right = np.array([item.right for item in judged], dtype=np.float64)
    both = [seen.get(id(item), False) for item in judged]
    pairs = [id(item) in seen for item in judged]  # a pair counts at its first question
    parts = np.stack([right, np.ones_like(right), both, pairs], axis=1).astype(np.float64)
    groups, units = (np.array([getattr(item, name) for item in judged]) for name in ("category", "question_id"))
    return Verdicts(right, groups, units, parts, _perception)


def _perception(sums: Sums) -> np.ndarray:
    tasks = np.stack([sums[task] for task in PERCEPTION if task in sums])  # [tasks, draws, 4]
    right, questions, both, pairs = np.moveaxis(tasks, -1, 0)
    return (100 * right / questions + 100 * both / np.maximum(pairs, 1)).sum(0)


def result_files(judged: Iterable[Judged]) -> dict[str, str]:
    """Contents of the result files (``<category>.txt``) that the benchmark's own script reads."""
    files: dict[str, str] = {}
    for item in judged:
        name = f"{item.category}.txt"
        files[name] = files.get(name, "") + item.line() + "\n"
    return files


def read_truth(folder: str | Path) -> Truth:
    """Read ``MME_Benchmark_release_version``: one folder a category, in either of its two layouts."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the MME folder {folder} does not exist")
    truth: Truth = {}
    for category in sorted(path for path in folder.iterdir() if path.is_dir()):
        split_layout = (category / "images").is_dir()
        for file in sorted((category / "questions_answers_YN" if split_layout else category).glob("*.txt")):
            for number, line in iter_lines(file):
                fields = line.strip().split("\t")
                if len(fields) != 2 or fields[1].lower() not in ("yes", "no"):
                    raise UserError(f"{file}, line {number}: 'question<TAB>Yes or No' was expected")
                truth[category.name, file.name, fields[0]] = fields[1]
    if not truth:
        raise UserError(f"{folder} holds no MME annotation")
    return truth


def score_files(
    annotation_dir: str | Path,
    result_file: str | Path,
    *,
    allow_partial: bool = False,
    results_dir: str | Path | None = None,
) -> Scores:
    """:func:`score_mme` on files; with ``results_dir`` the benchmark's own result files are written there."""
    truth = read_truth(annotation_dir)
    judged = judge(read_answers(result_file), truth)
    scores = score_mme(judged, truth, allow_partial=allow_partial)
    if results_dir is not None:
        for name, text in result_files(judged).items():
            write_whole(Path(results_dir) / name, text)
    return scores


def judge_files(annotation_dir: str | Path, result_file: str | Path) -> Verdicts:
    """Verdicts on the answers, in their order."""
    return verdicts_of(judge(read_answers(result_file), read_truth(annotation_dir)))


def print_scores(scores: Scores) -> None:
    """The scores as a table."""
    rows: list[tuple[Any, ...]] = [
        (task, values["acc"], values["acc_plus"], values["score"]) for task, values in scores["tasks"].items()
    ]
    rows.append(("Perception (max 2000)", None, None, scores["perception"]))
    rows.append(("Cognition (max 800)", None, None, scores["cognition"]))
    show(f"MME, {scores['answered']} questions", ("task", "acc %", "acc+ %", "score"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = score_parser("Score MME answers.")
    parser.add_argument("--annotation-dir", required=True, metavar="DIR", help="MME_Benchmark_release_version")
    parser.add_argument("--results-dir", metavar="DIR", help="also write <category>.txt for MME's own script here")
    args = parser.parse_args(argv)
    scores = score_files(
        args.annotation_dir, args.result_file, allow_partial=args.allow_partial, results_dir=args.results_dir
    )
    publish(scores, args, print_scores)


if __name__ == "__main__":
    run_main(main)
