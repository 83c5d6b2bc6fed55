"""POPE's scorer against the published rules, one quirk a test."""

import json
import random

import pytest

from llava.eval import eval_pope
from llava.eval.eval_pope import binary_metrics, says_yes, score_pope
from llava.utils import UserError


@pytest.mark.parametrize(
    ("why", "text", "yes"),
    [
        ("yes", "Yes", True),
        ("No", "No", False),
        ("no", "no", False),
        ("not", "There is not", False),
        ("NO is none of the three words", "NO", True),
        ("Not is none of the three words", "Not there", True),
        ("comma is dropped before splitting", "No, it is absent", False),
        ("comma joins words", "yes,no", True),
        ("only the text before the first full stop counts", "Yes. No", True),
        ("no before the full stop counts", "No. Yes", False),
        ("a leading full stop leaves nothing, which is yes", ".no", True),
        ("empty is yes", "", True),
        ("only spaces split: a newline does not", "well\nno", True),
        ("only spaces split: a tab does not", "\tno", True),
        ("several spaces split too", "well   no", False),
        ("part of a word does not count", "nothing known", True),
        ("contraction does not count", "there isn't", True),
        ("other punctuation sticks to the word", "no!", True),
        ("quotation marks stick to the word", '"no"', True),
        ("unicode full stop does not end the sentence", "ja。 no", False),
        ("no-break space does not split", "x\u00a0no", True),
        ("digits", "0 no 1", False),
        ("very long", "x " * 50_000 + "no", False),
    ],
)
def test_reading_an_answer(why, text, yes):
    assert says_yes(text) is yes, why


def test_hundreds_of_adversarial_answers_by_the_written_rule():
    rng = random.Random(3)
    bits = ["no", "No", "not", "NO", "yes", ".", ",", " ", " ", "\n", "\t", "é", "!", "'", "\u2028", "3", "x"]
    for _ in range(800):
        text = "".join(rng.choices(bits, k=rng.randint(0, 9)))
        sentence = text[: text.index(".")] if "." in text else text
        padded = " " + sentence.replace(",", "") + " "
        expected = not any(f" {word} " in padded for word in ("no", "No", "not"))
        assert says_yes(text) is expected, repr(text)


def test_metrics_by_hand():
    # 2 true yes, 1 false yes, 3 true no, 2 missed
    predicted = [True, True, True, False, False, False, False, False]
    labels = [True, True, False, False, False, False, True, True]
    values = binary_metrics(predicted, labels)
    assert values["accuracy"] == pytest.approx(100 * 5 / 8)
    assert values["precision"] == pytest.approx(100 * 2 / 3)
    assert values["recall"] == pytest.approx(50)
    assert values["f1"] == pytest.approx(100 * 4 / 7)
    assert values["yes_ratio"] == pytest.approx(37.5)


def test_no_yes_at_all_gives_zeros_and_not_an_exception():
    values = binary_metrics([False, False], [True, False])
    assert (values["precision"], values["recall"], values["f1"]) == (0, 0, 0)


def _set(**labels):
    """Questions and labels of each category; label files have ids of their own, as POPE's do."""
    questions, files = [], {}
    for category, entries in labels.items():
        files[category] = [{"question_id": index + 1, "label": label} for index, label in enumerate(entries)]
        for label in entries:
            questions.append({"question_id": len(questions) + 100, "text": f"Is {label}?", "category": category})
    return questions, files


def _answer(questions, texts):
    return [
        {"question_id": q["question_id"], "prompt": q["text"], "text": t} for q, t in zip(questions, texts, strict=True)
    ]


def test_labels_are_met_by_order_and_not_by_id():
    questions, labels = _set(random=["yes", "no"], popular=["no", "no"])
    labels["random"][0]["question_id"], labels["random"][1]["question_id"] = 101, 100
    scores = score_pope(_answer(questions, ["Yes", "No", "No", "No"]), questions, labels)
    assert scores["categories"]["random"]["accuracy"] == scores["categories"]["popular"]["accuracy"] == 100


def test_score_is_the_mean_f1_of_the_categories():
    questions, labels = _set(random=["yes", "no"], adversarial=["yes", "no"])
    scores = score_pope(_answer(questions, ["Yes", "No", "Yes", "Yes"]), questions, labels)
    assert scores["score"] == pytest.approx((100 + 100 * 2 / 3) / 2)


def test_categories_may_be_interleaved_in_the_answers():
    questions, labels = _set(random=["yes", "no"], popular=["no", "yes"])
    mixed = [questions[i] for i in (2, 0, 3, 1)]
    scores = score_pope(_answer(mixed, ["No", "Yes", "Yes", "No"]), questions, labels)
    assert {values["accuracy"] for values in scores["categories"].values()} == {100}


def test_unequal_lengths_are_an_error():
    questions, labels = _set(random=["yes", "no"])
    labels["random"].append({"label": "yes"})
    with pytest.raises(UserError, match="2 questions and 3 labels"):
        score_pope(_answer(questions, ["Yes", "No"]), questions, labels)


def test_missing_answers_need_permission_and_then_keep_their_labels():
    questions, labels = _set(random=["yes", "no", "yes", "no"])
    answers = _answer(questions, ["Yes", "No", "Yes", "No"])
    del answers[1]
    with pytest.raises(UserError, match="3 of 4"):
        score_pope(answers, questions, labels)
    scores = score_pope(answers, questions, labels, allow_partial=True)
    assert scores["accuracy"] == 100 and scores["answered"] == 3


def test_an_answer_to_no_question_is_an_error():
    questions, labels = _set(random=["yes"])
    with pytest.raises(UserError, match="not in this order"):
        score_pope([{"question_id": 5, "prompt": "?", "text": "no"}], questions, labels, allow_partial=True)


def test_category_without_label_file_and_strange_label_are_errors():
    questions, labels = _set(random=["yes"])
    with pytest.raises(UserError, match="popular"):
        score_pope(_answer(questions, ["Yes"]), [{**questions[0], "category": "popular"}], labels)
    labels["random"][0]["label"] = "maybe"
    with pytest.raises(UserError, match="maybe"):
        score_pope(_answer(questions, ["Yes"]), questions, labels)


def test_command_line(tmp_path, capsys):
    questions, labels = _set(random=["yes", "no"], popular=["no", "yes"])
    (tmp_path / "coco").mkdir()
    for category, entries in labels.items():
        (tmp_path / "coco" / f"coco_pope_{category}.json").write_text("\n".join(map(json.dumps, entries)))
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, _answer(questions, ["Yes", "No", "No", "Yes"]))))
    argv = ["--annotation-dir", f"{tmp_path}/coco", "--question-file", f"{tmp_path}/q.jsonl"]
    eval_pope.main([*argv, "--result-file", f"{tmp_path}/a.jsonl"])
    assert "random" in capsys.readouterr().out
    eval_pope.main([*argv, "--result-file", f"{tmp_path}/a.jsonl", "--json"])
    assert json.loads(capsys.readouterr().out)["score"] == 100
