"""Verdicts on single answers add up to the published scores, and intervals of differences cover what they should."""

import json
import random

import numpy as np
import pytest

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.eval_mme import PERCEPTION
from llava.eval.verdicts import Verdicts, difference_interval


@pytest.fixture(scope="module", params=BENCHMARKS)
def answered(request, tmp_path_factory):
    """A benchmark of the mini data, and two answers files: words of the benchmark's own, by chance."""
    benchmark = BENCHMARKS[request.param]
    files = benchmark.files()
    folder = tmp_path_factory.mktemp(benchmark.name)
    rng = random.Random(1)
    questions = [json.loads(line) for line in files.questions.read_text(encoding="utf-8").splitlines()]
    words = ["yes", "no", "Yes.", "two", "red", "circle"]
    if benchmark.name == "gqa":
        truth = json.loads(files.truth.read_text(encoding="utf-8"))
        words = [*sorted({entry["answer"] for entry in truth.values()})[:4], "yes", "no"]
    if benchmark.name == "textvqa":
        entries = json.loads(files.truth.read_text(encoding="utf-8"))["data"]
        words = [entry["answers"][0] for entry in entries[:3]]
    written = []
    for name in ("one", "other"):
        path = folder / f"{name}.jsonl"
        path.write_text(
            "".join(
                json.dumps({"question_id": asked["question_id"], "prompt": asked["text"], "text": rng.choice(words)})
                + "\n"
                for asked in questions
            )
        )
        written.append(path)
    return benchmark, files, written


def test_verdicts_add_up_to_the_published_score(answered) -> None:
    benchmark, files, written = answered
    for answers in written:
        scores, verdicts = benchmark.score(files, answers), benchmark.judge(files, answers)
        assert len(verdicts.values) == scores["answered"]
        assert verdicts.total() == pytest.approx(scores["score"]) and scores["score"] > 0


def test_the_mean_of_the_verdicts_is_the_published_total_where_that_is_a_mean(answered) -> None:
    benchmark, files, (answers, _) = answered
    scores, verdicts = benchmark.score(files, answers), benchmark.judge(files, answers)
    by_group = {group: 100 * verdicts.values[verdicts.groups == group].mean() for group in set(verdicts.groups)}
    if benchmark.name in ("gqa", "textvqa"):
        assert 100 * verdicts.values.mean() == pytest.approx(scores["accuracy"])
    elif benchmark.name == "pope":
        assert by_group == pytest.approx({name: of["accuracy"] for name, of in scores["categories"].items()})
    else:
        assert by_group == pytest.approx({name: of["acc"] for name, of in scores["tasks"].items()})


def test_the_questions_of_a_picture_are_drawn_together() -> None:
    files = BENCHMARKS["mme"].files()
    questions = [json.loads(line) for line in files.questions.read_text(encoding="utf-8").splitlines()]
    assert len({asked["question_id"] for asked in questions}) == len(questions) / 2
    assert {asked["question_id"].split("/")[0] for asked in questions} & set(PERCEPTION)


def test_an_interval_covers_the_difference_and_is_the_same_twice(answered) -> None:
    benchmark, files, written = answered
    one, other = (benchmark.judge(files, answers) for answers in written)
    low, high = difference_interval(one, other, draws=400)
    assert low < one.total() - other.total() < high
    assert difference_interval(one, other, draws=400) == (low, high)
    assert difference_interval(one, one, draws=50) == (0, 0)
    assert difference_interval(other, one, draws=400) == pytest.approx((-high, -low))


def test_a_paired_interval_is_that_of_the_mean_of_differences() -> None:
    """Against the normal interval of a mean, which knows nothing of drawing; much narrower than unpaired."""
    rng = np.random.default_rng(3)
    one = (rng.random(2000) < 0.7).astype(float)
    other = np.where(rng.random(2000) < 0.05, 1 - one, one)
    low, high = difference_interval(Verdicts.of_mean(one), Verdicts.of_mean(other), draws=4000)
    differences = 100 * (one - other)
    half = 1.96 * differences.std() / len(differences) ** 0.5
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.15)


def test_runs_over_other_questions_have_no_difference() -> None:
    with pytest.raises(ValueError, match="the same questions"):
        difference_interval(Verdicts.of_mean([1, 0]), Verdicts.of_mean([1, 0, 1]))
