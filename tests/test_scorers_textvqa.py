"""TextVQA's scorer against the published rules, one quirk a test."""

import itertools
import json
import random
import re

import pytest

from llava.eval import eval_textvqa
from llava.eval.eval_textvqa import (
    contractions,
    has_ocr_tokens,
    normalize,
    question_of,
    score_textvqa,
    soft_scores,
)
from llava.utils import UserError


@pytest.mark.parametrize(
    ("why", "answer", "expected"),
    [
        ("capitals do not count", "STOP", "stop"),
        ("comma inside a number is deleted, not a space", "1,000", "1000"),
        ("question mark is deleted before words are split", "what?now", "whatnow"),
        ("possessive is split off", "wendy's", "wendy 's"),
        ("possessive is split in upper case too", "WENDY'S", "wendy 's"),
        ("newline is a space", "a\nb", "b"),
        ("tab is a space", "x\ty", "x y"),
        ("outer white space is dropped", " \n yes\t ", "yes"),
        ("inner runs of white space become one space", "new   york", "new york"),
        ("mark inside a word becomes a space", "coca-cola", "coca cola"),
        ("mark at a word's edge is deleted everywhere", "coca-cola -", "cocacola"),
        ("each mark is judged on the text before any was deleted", "x-/ y-z", "x y z"),
        ("mark without a neighbouring space at the end becomes a space and goes", "stop!", "stop"),
        ("exclamation inside", "stop!now", "stop now"),
        ("underscore", "a_b", "b"),
        ("brackets", "[x](y){z}", "x y z"),
        ("at and backtick", "me@home`x", "me home x"),
        ("quotes", 'say "hi"', "say hi"),
        ("backslash", "c\\d", "c d"),
        ("colon, dollar, percent, ampersand, star, hash stay", "1:2 $5 5% a&b * #1", "1:2 $5 5% a&b * #1"),
        ("full stop before a digit stays", "3.5", "3.5"),
        ("leading full stop before a digit stays", ".5", ".5"),
        ("full stop after a digit goes", "5.", "5"),
        ("full stop between letters goes without a space", "u.s.a.", "usa"),
        ("full stop before a digit stays even after a letter", "v.2", "v.2"),
        ("only the last of several full stops stays before a digit", "..5", ".5"),
        ("at most 32 full stops are deleted", "." * 40, "." * 8),
        ("exactly 32 full stops vanish", "." * 32, ""),
        ("an Arabic digit is a digit too", ".٣", ".٣"),
        ("number words", "zero one two three four five six seven eight nine ten", "0 1 2 3 4 5 6 7 8 9 10"),
        ("none is zero", "none", "0"),
        ("eleven stays a word", "eleven", "eleven"),
        ("articles are dropped", "the cat and a dog an owl", "cat and dog owl"),
        ("an article alone leaves nothing", "The", ""),
        ("contraction without apostrophe", "dont", "don't"),
        ("contraction with an s after the apostrophe is split before it is looked up", "it's", "it 's"),
        ("contraction inside a sentence", "you cant stop", "you can't stop"),
        ("contraction with a capital key is never met, text being lower case", "Im", "im"),
        ("article is compared after the number words", "one", "1"),
        ("a hyphen may set an article free", "a-team", "team"),
        ("empty", "", ""),
        ("only punctuation", "?!,", ""),
        ("accents stay", "Café", "café"),
        ("typographic apostrophe is no apostrophe", "wendy’s", "wendy’s"),
        ("no-break space splits words", "a\u00a0b", "b"),
        ("carriage return splits words", "x\r\ny", "x y"),
        ("dotted capital I", "İ", "i̇"),
        ("Chinese full stop stays", "停。", "停。"),
        ("very long", "the word, " * 3000, " ".join(["word"] * 3000)),
    ],
)
def test_normalising(why, answer, expected):
    assert normalize(answer) == expected, why


_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"


def _as_written(text):
    """The rule as the format description words it, step by step, sharing nothing with the scorer but the data."""
    text = text.lower()
    for gone in ",?":
        text = "".join(c for c in text if c != gone)
    text = " 's".join(text.split("'s")).strip()
    text = "".join(" " if c in "\n\t" else c for c in text).strip()
    step_input = text
    for p in [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]:
        at_edge = re.search(rf"{re.escape(p)} | {re.escape(p)}", step_input)
        text = ("" if at_edge else " ").join(text.split(p))
    kept, deleted = [], 0
    for i, c in enumerate(text):
        digit_follows = i + 1 < len(text) and re.fullmatch(r"\d", text[i + 1])
        if c == "." and not digit_follows and deleted < 32:
            deleted += 1
        else:
            kept.append(c)
    words = "".join(kept).split()
    numbers = {word: str(value) for value, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}
    words = [numbers.get(word, word) for word in words]
    words = [word for word in words if word not in {"a", "an", "the"}]
    return " ".join(contractions().get(word, word) for word in words)


def test_normalising_agrees_with_the_written_rule_on_adversarial_answers():
    rng = random.Random(0)
    bits = [*";/[]\"{}()=+\\_-><@`,?!.:'", "'s", " ", " ", "\n", "\t", "3", "٣", "5.", "A", "the", "an", "None", "Ten"]
    bits += ["dont", "Isn't", "wont", "é", "停", "\u2028", "\u00a0", "x", "Y", "word"]
    answers = ["".join(rng.choices(bits, k=rng.randint(0, 25))) for _ in range(3000)]
    answers += list(contractions()) + [word.upper() for word in contractions()]
    answers += ["".join(pair) for pair in itertools.product(bits, bits)]
    for answer in answers:
        assert normalize(answer) == _as_written(answer), repr(answer)


def test_all_120_contractions_are_there_and_used():
    table = contractions()
    assert len(table) == 120
    # A key is met as a whole word; keys with a capital, or with 's inside, never come out of the earlier steps.
    reachable = [key for key in table if key == key.lower() and "'s" not in key]
    assert len(reachable) > 100
    for key in reachable:
        assert normalize(key) == table[key]


@pytest.mark.parametrize(("matches", "expected"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)])
def test_soft_accuracy_is_the_mean_over_leave_one_out_sets(matches, expected):
    answers = ["yes"] * matches + [f"other {index}" for index in range(10 - matches)]
    by_hand = sum(min(1, sum(a == "yes" for a in answers[:i] + answers[i + 1 :]) / 3) for i in range(10)) / 10
    assert by_hand == pytest.approx(expected)
    assert soft_scores(answers)["yes"] == pytest.approx(expected)


def test_human_answers_are_normalised_before_they_are_counted():
    assert soft_scores(["The Two", "2", "two.", *"abcdefg"])["2"] == pytest.approx(0.9)


def test_nine_human_answers_are_an_error():
    with pytest.raises(UserError, match="10 human answers"):
        soft_scores(["x"] * 9)


@pytest.mark.parametrize(
    ("why", "prompt", "question"),
    [
        ("two lines", "What Is it?\nAnswer in one word.", "what is it?"),
        ("three lines with tokens", "What?\nReference OCR token: A, B\nAnswer.", "what?"),
        ("empty token list keeps its trailing space", "What?\nReference OCR token: \nAnswer.", "what?"),
        ("marker first", "Reference OCR token: A\nWhat?\nAnswer.", "what?"),
        ("marker first and empty", "Reference OCR token: \nWhat?\nAnswer.", "what?"),
        ("the older kind", "OCR tokens: a. Question: What Brand? Short answer:", "what brand?"),
        ("the older kind over several lines", "OCR tokens: a\nQuestion: What\nbrand? Short answer: x", "what\nbrand?"),
        ("the older kind stops at the first Short answer",
         "OCR tokens: a Question: q1 Short answer: Short answer:", "q1"),
        ("two lines, marker in the second", "What?\nReference OCR token: A", "what?"),
    ],
)  # fmt: skip
def test_question_in_prompt(why, prompt, question):
    assert question_of(prompt) == question, why


@pytest.mark.parametrize(
    "prompt", ["What?", "a\nb\nc", "What?\nReference OCR token: A\nB\nAnswer.", "OCR tokens: no question", ""]
)
def test_prompt_of_unknown_kind_is_an_error_that_names_it(prompt):
    with pytest.raises(UserError, match=re.escape(repr(prompt))):
        question_of(prompt)


def _annotation(image="i1", question="What?", answer="stop"):
    return {"image_id": image, "question": question, "answers": [answer] * 10}


def _answer(text, image="i1", prompt="What?\nAnswer."):
    return {"question_id": image, "prompt": prompt, "text": text}


def test_one_image_with_two_questions_is_told_apart_by_the_question():
    annotations = [_annotation(), _annotation(question="Where?", answer="here")]
    answers = [_answer("stop"), _answer("here", prompt="Where?\nAnswer.")]
    assert score_textvqa(answers, annotations)["score"] == 100


def test_prediction_is_looked_up_exactly_after_normalising():
    scores = [score_textvqa([_answer(text)], [_annotation()])["score"] for text in ("The stop.", "stop sign", "")]
    assert scores == [100, 0, 0]


def test_missing_answer_needs_allow_partial():
    annotations = [_annotation(), _annotation(image="i2")]
    with pytest.raises(UserError, match="1 of 2"):
        score_textvqa([_answer("stop")], annotations)
    scores = score_textvqa([_answer("stop")], annotations, allow_partial=True)
    assert (scores["score"], scores["answered"], scores["total"]) == (100, 1, 2)


def test_unknown_image_is_an_error():
    with pytest.raises(UserError, match="i9"):
        score_textvqa([_answer("stop", image="i9")], [_annotation()])


def test_prompt_kinds_are_told_apart():
    assert has_ocr_tokens("What?\nReference OCR token: \nAnswer.")
    assert not has_ocr_tokens("What?\nAnswer.")


def test_command_line_prints_percentage_with_two_digits_and_prompt_kind(tmp_path, capsys):
    annotations = [_annotation(image=f"i{i}") for i in range(3)]
    answers = [_answer("stop" if i == 0 else "go", image=f"i{i}") for i in range(3)]
    (tmp_path / "val.json").write_text(json.dumps({"data": annotations}))
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    argv = ["--annotation-file", str(tmp_path / "val.json"), "--result-file", str(tmp_path / "answers.jsonl")]
    eval_textvqa.main(argv)
    out = capsys.readouterr().out
    assert "33.33" in out and "3 without OCR tokens" in out
    eval_textvqa.main([*argv, "--json"])
    assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(100 / 3)
