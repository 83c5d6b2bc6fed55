"""GQA accuracy by the benchmark's own rule: the predicted string equals the answer, over balanced questions.

``python -m llava.eval.eval_gqa --annotation-file testdev_balanced_questions.json --result-file answers.jsonl``
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.eval.files import iter_lines, read_answers, read_json
from llava.eval.scoring import Scores, check_complete, mean, publish, score_parser, show
from llava.eval.verdicts import Verdicts
from llava.utils import UserError, run_main


def to_predictions(answers: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Answers as GQA's own evaluation reads them: final full stops and capitals dropped, nothing else."""
    return [
        {"questionId": str(answer["question_id"]), "prediction": answer["text"].rstrip(".").lower()}
        for answer in answers
    ]


def judge_gqa(
    predictions: Iterable[Mapping[str, str]], questions: Mapping[str, Mapping[str, Any]]
) -> dict[str, bool | None]:
    """Whether each balanced question's prediction is right, by id in the questions' order; None: it has none.

    Raises:
        UserError: no question is balanced.
    """
    predicted = {str(entry["questionId"]): entry["prediction"] for entry in predictions}
    balanced = [qid for qid, question in questions.items() if question.get("isBalanced")]
    if not balanced:
        raise UserError("the GQA question file holds no balanced question")
    return {qid: predicted[qid] == questions[qid]["answer"] if qid in predicted else None for qid in balanced}


def score_gqa(
    predictions: Iterable[Mapping[str, str]], questions: Mapping[str, Mapping[str, Any]], *, allow_partial: bool = False
) -> Scores:
    """Score predictions (``questionId``, ``prediction``) against GQA's question dictionary.

    Returns percentages: ``score`` (= ``accuracy``), ``binary``, ``open``, and ``structural``, ``semantic``,
    ``length`` (words in the question) as ``{group: {"accuracy", "n"}}``. A question predicted twice counts
    with its last prediction, as in the benchmark's script; predictions of unknown questions are ignored.

    Raises:
        UserError: a balanced question has no prediction (unless ``allow_partial``), or none is balanced.
    """
    judged = judge_gqa(predictions, questions)
    missing = [qid for qid, hit in judged.items() if hit is None]
    answered = check_complete(missing, len(judged), allow_partial)

    groups: dict[str, dict[Any, list[bool]]] = {key: defaultdict(list) for key in ("kind", *_GROUPINGS)}
    hits: list[bool] = []
    for qid, hit in judged.items():
        if hit is None:
            continue
        question = questions[qid]
        types = question["types"]
        hits.append(hit)
        groups["kind"]["open" if types["structural"] == "query" else "binary"].append(hit)
        groups["structural"][types["structural"]].append(hit)
        groups["semantic"][types["semantic"]].append(hit)
        groups["length"][len(question["question"].split())].append(hit)

    accuracy = _percent(hits)
    return {
        "benchmark": "gqa",
        "score": accuracy,
        "answered": answered,
        "total": len(judged),
        "accuracy": accuracy,
        "binary": _percent(groups["kind"]["binary"]),
        "open": _percent(groups["kind"]["open"]),
        **{
            key: {str(group): {"accuracy": _percent(of), "n": len(of)} for group, of in sorted(groups[key].items())}
            for key in _GROUPINGS
        },
    }


_GROUPINGS = ("structural", "semantic", "length")


def _percent(hits: Sequence[bool]) -> float | None:
    share = mean(hits)
    return None if share is None else 100 * share


def read_predictions(path: str | Path) -> list[dict[str, str]]:
    """Read an answers file (jsonl), or a file already converted for GQA's own evaluation (a JSON array)."""
    first = next((line for _, line in iter_lines(Path(path))), "")
    if not first.lstrip().startswith("["):
        return to_predictions(read_answers(path))
    predictions = read_json(path)
    for index, entry in enumerate(predictions):
        if not isinstance(entry, dict) or not {"questionId", "prediction"} <= entry.keys():
            raise UserError(f'{path}, entry {index}: "questionId" and "prediction" were expected')
    return predictions


def read_gqa_questions(path: str | Path) -> dict[str, Any]:
    """GQA's question dictionary."""
    questions = read_json(path)
    if not isinstance(questions, dict):
        raise UserError(f"{path}: a dictionary of questions was expected")
    return questions


def score_files(annotation_file: str | Path, result_file: str | Path, *, allow_partial: bool = False) -> Scores:
    """:func:`score_gqa` on files."""
    questions = read_gqa_questions(annotation_file)
    return score_gqa(read_predictions(result_file), questions, allow_partial=allow_partial)


def judge_files(annotation_file: str | Path, result_file: str | Path) -> Verdicts:
    """Verdicts on the balanced questions that are answered."""
    judged = judge_gqa(read_predictions(result_file), read_gqa_questions(annotation_file))
    return Verdicts.of_mean([hit for hit in judged.values() if hit is not None])


def print_scores(scores: Scores) -> None:
    """The scores as tables."""
    rows = [("accuracy", scores["accuracy"]), ("binary", scores["binary"]), ("open", scores["open"])]
    show(f"GQA, {scores['answered']} questions", ("", "%"), rows)
    groups = [
        (f"{key}: {group}", values["accuracy"], values["n"])
        for key in ("structural", "semantic")
        for group, values in scores[key].items()
    ]
    show("GQA by type", ("type", "%", "n"), groups)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = score_parser("Score GQA answers.")
    parser.add_argument("--annotation-file", required=True, metavar="FILE", help="testdev_balanced_questions.json")
    args = parser.parse_args(argv)
    scores = score_files(args.annotation_file, args.result_file, allow_partial=args.allow_partial)
    publish(scores, args, print_scores)


if __name__ == "__main__":
    run_main(main)
