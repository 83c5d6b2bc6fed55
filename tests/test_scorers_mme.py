"""MME's scorer against the published rules, one quirk a test."""

import json
import random

import pytest

from llava.eval import eval_mme
from llava.eval.eval_mme import category_of, judge, parse_answer, read_truth, result_files, score_mme
from llava.utils import UserError

INSTRUCTION = "Answer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("why", "answer", "expected"),
    [
        ("exactly yes", "yes", "yes"),
        ("exactly no", "no", "no"),
        ("capitals do not count", "YES", "yes"),
        ("full stop after it", "No.", "no"),
        ("four characters cut yes short after no", "noyes", "no"),
        ("yes at the very start", "yesno", "yes"),
        ("yes may start at the second character", "ayes", "yes"),
        ("yes from the third character on is cut", "a yes", "other"),
        ("no within four characters of another word", "know", "no"),
        ("not", "not sure", "no"),
        ("none", "none", "no"),
        ("no too late", "I think no", "other"),
        ("leading quotation mark", '"no"', "no"),
        ("leading newline", "\nyes", "yes"),
        ("leading tab", "\tno", "no"),
        ("two leading spaces push yes out", "  yes", "other"),
        ("two leading spaces leave no in", "  no", "no"),
        ("three leading spaces push no out", "   no", "other"),
        ("empty", "", "other"),
        ("one letter", "y", "other"),
        ("full-width letters", "ｙｅｓ", "other"),
        ("very long", "x" * 100_000 + "yes", "other"),
        ("correct", "correct", "other"),
    ],
)
def test_parsing(why, answer, expected):
    assert parse_answer(answer) == expected, why


def test_hundreds_of_adversarial_answers_and_their_result_lines_read_the_same():
    """What goes into a result file, read back by position of its tabs, parses as the answer itself does."""
    rng = random.Random(2)
    bits = ["yes", "No", "n", "y", " ", "\t", "\n", "\r", "\r\n", ".", ",", "é", "\u2028", "\x0b", "1", "the", "'"]
    truth = {("OCR", "1.txt", "Q? Please answer yes or no."): "Yes"}
    for _ in range(600):
        text = "".join(rng.choices(bits, k=rng.randint(0, 7)))
        head = text.lower()[:4]
        expected = "yes" if "yes" in head else "no" if "no" in head else "other"
        assert parse_answer(text) == expected, repr(text)
        judged = judge([{"question_id": "OCR/1.png", "prompt": f"Q? {INSTRUCTION}", "text": text}], truth)
        content = result_files(judged)["OCR.txt"]
        assert content.count("\n") == 1 and content.count("\t") == 3 and "\r" not in content
        file, prompt, gt, answer = content[:-1].split("\t")
        assert (file, prompt, gt) == ("1.txt", "Q? Please answer yes or no.", "Yes")
        assert parse_answer(answer) == expected


def _judge_one(prompt, question, question_id="artwork/images/14777.jpg"):
    return judge(
        [{"question_id": question_id, "prompt": prompt, "text": "yes"}], {("artwork", "14777.txt", question): "Yes"}
    )[0]


@pytest.mark.parametrize(
    ("why", "prompt", "question"),
    [
        ("the instruction is removed, yes-or-no added", f"Q?\n{INSTRUCTION}", "Q? Please answer yes or no."),
        ("yes-or-no is not added twice", f"Q? Please answer yes or no.\n{INSTRUCTION}", "Q? Please answer yes or no."),
        ("two spaces before Please in the annotation", f"Q?\n{INSTRUCTION}", "Q?  Please answer yes or no."),
        ("no instruction at all", "Q?", "Q? Please answer yes or no."),
    ],
)
def test_question_is_matched(why, prompt, question):
    assert _judge_one(prompt, question).prompt == question, why


def test_file_is_the_base_name_up_to_the_first_full_stop():
    assert _judge_one("Q?", "Q? Please answer yes or no.", "artwork/images/14777.tar.jpg").file == "14777.txt"


def test_question_without_truth_is_an_error():
    with pytest.raises(UserError, match=r"artwork/14777\.txt"):
        _judge_one("Other?", "Q? Please answer yes or no.")


@pytest.mark.parametrize(
    "question_id",
    ["../x/1.png", "..", "/etc/passwd", "a/../../b.png", "OCR", "OCR/", "", "/1.png", "a//b.png", "./1.png",
     "..\\x/1.png", "OCR\\..\\x/1.png", "c:/1.png", "a\n/1.png", 7, None],
)  # fmt: skip
def test_ids_that_could_name_files_elsewhere_are_refused(question_id):
    with pytest.raises(UserError, match="MME question id"):
        category_of(question_id)


def _items(*answers):
    """Two questions (yes, no) a picture of category OCR; answers in order."""
    truth = {}
    records = []
    for index, text in enumerate(answers):
        picture, is_yes = index // 2, index % 2 == 0
        question = f"Q{index}? Please answer yes or no."
        truth["OCR", f"{picture}.txt", question] = "Yes" if is_yes else "No"
        records.append({"question_id": f"OCR/{picture}.png", "prompt": question, "text": text})
    return judge(records, truth), truth


def test_accuracy_plus_needs_both_questions_of_a_picture():
    scores = score_mme(*_items("yes", "no", "yes", "yes", "perhaps", "no"))
    assert scores["tasks"]["OCR"]["acc"] == pytest.approx(100 * 4 / 6)
    assert scores["tasks"]["OCR"]["acc_plus"] == pytest.approx(100 / 3)
    assert scores["score"] == scores["perception"] == pytest.approx(100 * 4 / 6 + 100 / 3)
    assert scores["cognition"] is None


def test_an_answer_that_is_neither_is_wrong_for_yes_and_for_no():
    assert score_mme(*_items("maybe", "maybe"))["tasks"]["OCR"]["acc"] == 0


def test_perception_and_cognition_are_sums_over_their_tasks():
    truth, records = {}, []
    for category in (*eval_mme.PERCEPTION, *eval_mme.COGNITION, "surprise"):
        for number, gt in enumerate(("Yes", "No")):
            truth[category, "1.txt", f"Q{number}? Please answer yes or no."] = gt
            records.append({"question_id": f"{category}/1.png", "prompt": f"Q{number}?", "text": gt})
    scores = score_mme(judge(records, truth), truth)
    assert (scores["perception"], scores["cognition"]) == (2000, 800)
    assert scores["tasks"]["surprise"]["score"] == 200


def test_a_partial_file_needs_permission_and_counts_whole_pictures_for_plus():
    judged, truth = _items("yes", "no", "yes", "no")
    with pytest.raises(UserError, match="3 of 4"):
        score_mme(judged[:3], truth)
    scores = score_mme(judged[1:], truth, allow_partial=True)
    assert scores["tasks"]["OCR"] == {"acc": 100, "acc_plus": 100, "score": 200, "questions": 3, "images": 1}
    assert (scores["answered"], scores["total"]) == (3, 4)


def test_both_annotation_layouts_are_read(tmp_path):
    (tmp_path / "artwork" / "images").mkdir(parents=True)
    (tmp_path / "artwork" / "questions_answers_YN").mkdir()
    (tmp_path / "artwork" / "questions_answers_YN" / "1.txt").write_text("A? Please answer yes or no.\tYes\n")
    (tmp_path / "artwork" / "9.txt").write_text("not an annotation")
    (tmp_path / "OCR").mkdir()
    (tmp_path / "OCR" / "2.txt").write_text("B?\tYes\r\nC?\tNo\n\n")
    (tmp_path / "notes.txt").write_text("not a category")
    assert read_truth(tmp_path) == {
        ("artwork", "1.txt", "A? Please answer yes or no."): "Yes",
        ("OCR", "2.txt", "B?"): "Yes",
        ("OCR", "2.txt", "C?"): "No",
    }


def test_broken_annotation_line_is_named(tmp_path):
    (tmp_path / "OCR").mkdir()
    (tmp_path / "OCR" / "2.txt").write_text("B?\tYes\nC?\tmaybe\n")
    with pytest.raises(UserError, match=r"2\.txt, line 2"):
        read_truth(tmp_path)


def test_command_line_writes_result_files_for_the_benchmarks_own_script(tmp_path, capsys):
    folder = tmp_path / "MME" / "OCR"
    folder.mkdir(parents=True)
    (folder / "1.txt").write_text("A? Please answer yes or no.\tYes\nB? Please answer yes or no.\tNo\n")
    answers = [{"question_id": "OCR/1.png", "prompt": f"{q}?\n{INSTRUCTION}", "text": "Yes,\tor\nno"} for q in "AB"]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, answers)))
    argv = ["--annotation-dir", str(folder.parent), "--result-file", str(tmp_path / "a.jsonl")]
    eval_mme.main([*argv, "--results-dir", str(tmp_path / "out"), "--json"])
    assert json.loads(capsys.readouterr().out)["tasks"]["OCR"]["score"] == 50
    assert (tmp_path / "out" / "OCR.txt").read_text() == (
        "1.txt\tA? Please answer yes or no.\tYes\tYes, or no\n1.txt\tB? Please answer yes or no.\tNo\tYes, or no\n"
    )
    eval_mme.main(argv)
    assert "Perception" in capsys.readouterr().out
