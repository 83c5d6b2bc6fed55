"""GQA's scorer against the published rules, one quirk a test."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from llava.eval import eval_gqa
from llava.eval.eval_gqa import score_gqa, to_predictions
from llava.utils import UserError


def _question(answer="yes", structural="verify", semantic="attr", text="Is it red?", balanced=True):
    types = {"structural": structural, "semantic": semantic, "detailed": "x"}
    return {"question": text, "answer": answer, "isBalanced": balanced, "types": types}


def _predict(text, qid="1"):
    return to_predictions([{"question_id": qid, "text": text}])


@pytest.mark.parametrize(
    ("why", "answer", "text", "right"),
    [
        ("equal", "yes", "yes", True),
        ("final full stop is dropped", "yes", "yes.", True),
        ("all final full stops are dropped", "yes", "yes...", True),
        ("capitals of the prediction are dropped", "yes", "Yes", True),
        ("capitals of the answer are not", "T-shirt", "T-shirt", False),
        ("white space counts", "yes", "yes ", False),
        ("a full stop before white space stays", "yes", "yes. ", False),
        ("leading full stop stays", "yes", ".yes", False),
        ("inner full stop stays", "u.s", "U.S.", True),
        ("comma stays", "yes", "yes,", False),
        ("newline stays", "yes", "yes\n", False),
        ("articles stay", "table", "the table", False),
        ("number words stay", "2", "two", False),
        ("contraction stays", "don't", "dont", False),
        ("a longer answer is wrong", "yes", "yes, it is", False),
        ("empty is wrong", "yes", "", False),
        ("only full stops is empty", "", "...", True),
        ("unicode is compared as it is", "café", "CAFÉ", True),
        ("another composition of the same letter is another string", "café", "cafe\u0301", False),
        ("ideographic full stop stays", "yes", "yes。", False),
        ("very long", "yes", "yes" * 10_000, False),
        ("tab inside", "a b", "a\tb", False),
    ],
)
def test_exact_string_equality_after_full_stops_and_capitals(why, answer, text, right):
    assert score_gqa(_predict(text), {"1": _question(answer)})["score"] == (100 if right else 0), why


def test_hundreds_of_adversarial_answers_by_the_written_rule():
    rng = random.Random(1)
    bits = ["yes", "No", ".", ".", " ", "\n", "\t", ",", "é", "É", "ß", "İ", "'", "3", "the", "停"]
    for _ in range(500):
        text = "".join(rng.choices(bits, k=rng.randint(0, 6)))
        expected = text
        while expected.endswith("."):
            expected = expected[:-1]
        answer = rng.choice([expected.lower(), "".join(rng.choices(bits, k=2)).lower(), text])
        assert score_gqa(_predict(text), {"1": _question(answer)})["score"] == 100 * (expected.lower() == answer)


def test_only_balanced_questions_count():
    questions = {"1": _question(), "2": _question(answer="no", balanced=False)}
    scores = score_gqa(_predict("yes") + _predict("yes", "2"), questions)
    assert (scores["score"], scores["total"]) == (100, 1)


def test_an_unbalanced_question_needs_no_prediction():
    assert score_gqa(_predict("yes"), {"1": _question(), "2": _question(balanced=False)})["total"] == 1


def test_open_means_structural_query_and_all_else_is_binary():
    kinds = {"query": "red", "verify": "yes", "choose": "left", "logical": "no", "compare": "table"}
    questions = {kind: _question(answer, structural=kind) for kind, answer in kinds.items()}
    predictions = [p for kind in kinds for p in _predict("red" if kind == "query" else "wrong", kind)]
    scores = score_gqa(predictions, questions)
    assert (scores["open"], scores["binary"], scores["score"]) == (100, 0, 20)
    assert scores["structural"]["choose"] == {"accuracy": 0, "n": 1}


def test_by_semantic_type_and_question_length_in_words():
    questions = {
        "1": _question(semantic="rel", text="Is it to the left?"),
        "2": _question(semantic="obj", text="Is it?"),
    }
    scores = score_gqa(_predict("yes") + _predict("no", "2"), questions)
    assert scores["semantic"] == {"obj": {"accuracy": 0, "n": 1}, "rel": {"accuracy": 100, "n": 1}}
    assert scores["length"] == {"2": {"accuracy": 0, "n": 1}, "5": {"accuracy": 100, "n": 1}}


def test_missing_prediction_is_an_error_unless_partial():
    questions = {"1": _question(), "2": _question()}
    with pytest.raises(UserError, match=r"1 of 2.*'2'"):
        score_gqa(_predict("yes"), questions)
    scores = score_gqa(_predict("yes"), questions, allow_partial=True)
    assert (scores["score"], scores["answered"], scores["total"]) == (100, 1, 2)


def test_answers_of_another_benchmark_are_refused_even_if_partial():
    with pytest.raises(UserError, match="belong"):
        score_gqa(_predict("yes", "other"), {"1": _question()}, allow_partial=True)


def test_the_last_of_two_predictions_counts():
    assert score_gqa(_predict("no") + _predict("yes"), {"1": _question()})["score"] == 100


def _write(tmp_path, answers):
    (tmp_path / "questions.json").write_text(json.dumps({"1": _question(), "2": _question()}))
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return ["--annotation-file", str(tmp_path / "questions.json"), "--result-file", str(path)]


def _answers(*ids):
    return [{"question_id": qid, "prompt": "p", "text": "Yes."} for qid in ids]


def test_command_line_says_n_of_n_for_a_partial_file(tmp_path, capsys):
    argv = _write(tmp_path, _answers("1"))
    with pytest.raises(UserError):
        eval_gqa.main(argv)
    eval_gqa.main([*argv, "--allow-partial", "--json", str(tmp_path / "scores.json")])
    assert "1 of 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "scores.json").read_text())["answered"] == 1


def test_broken_answer_line_is_named(tmp_path):
    argv = _write(tmp_path, _answers("1", "2"))
    with open(argv[-1], "a") as stream:
        stream.write('{"question_id": "3", "te')
    with pytest.raises(UserError, match="line 3"):
        eval_gqa.main(argv)


def test_a_line_separator_inside_an_answer_does_not_split_its_line(tmp_path, capsys):
    argv = _write(tmp_path, [])
    text = json.dumps({"question_id": "1", "prompt": "p", "text": "\u2028x\x85"}, ensure_ascii=False)
    Path(argv[-1]).write_text(text + "\n", encoding="utf-8")
    eval_gqa.main([*argv, "--allow-partial", "--json"])
    assert json.loads(capsys.readouterr().out)["score"] == 0


def test_converted_file_is_what_the_benchmark_reads_and_scores_the_same(tmp_path, capsys):
    argv = _write(tmp_path, _answers("1", "2"))
    target = tmp_path / "testdev_balanced_predictions.json"
    script = Path(__file__).parents[1] / "scripts" / "convert_gqa_for_eval.py"
    subprocess.run([sys.executable, script, "--src", argv[-1], "--dst", target], check=True)
    assert json.loads(target.read_text()) == [
        {"questionId": "1", "prediction": "yes"},
        {"questionId": "2", "prediction": "yes"},
    ]
    eval_gqa.main([*argv[:2], "--result-file", str(target), "--json"])
    assert json.loads(capsys.readouterr().out)["score"] == 100
